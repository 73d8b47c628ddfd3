"""Linear as it serves on the GPU: for each shape and number of rows the plan's member, if certified here.

Triton members are certified by the tests and when a table is made. A library's are certified on each machine,
since its next version is not ours: at start, for every row count at which a plan wants one. What fails is
dropped for the next in the plan, and for a tile of our own in the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import triton

from isobatch import env
from isobatch.errors import ConfigError, UnsupportedOpError
from isobatch.kernels import plan as plans
from isobatch.kernels import sources
from isobatch.kernels.bitclass import certify
from isobatch.kernels.gpu.device import INTERPRETED, architecture, capturing, device, dtypes
from isobatch.kernels.linear import members
from isobatch.kernels.linear.cublaslt import version
from isobatch.kernels.linear.gpu_record import forget, record_for
from isobatch.kernels.linear.members import Launcher, Shape
from isobatch.kernels.linear.triton import linear_tile
from isobatch.kernels.linear.triton_float32 import linear_float32
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK, DenseWeight

_BEYOND = plans.BUCKETS[-1] + 1
"""Stands for all row counts beyond the buckets."""


class Certificates:
    """Which members of a library have been certified on this machine, kept between runs.

    Args:
        path: the file, in the cache folder by default; one that cannot be read counts as empty, one that
            cannot be written is not kept.
        keep: whether to read and write it at all.
    """

    def __init__(self, path: Path | None = None, keep: bool = True) -> None:
        name = sha256(json.dumps(_machine()).encode()).hexdigest()[:16]
        self.path = path or env.cache_dir() / f"certificates-{name}.json"
        self._kept = keep
        self._verdicts: dict[str, bool] = {}
        if not keep:
            return
        try:
            kept = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(kept, dict) and all(isinstance(verdict, bool) for verdict in kept.values()):
            self._verdicts = kept

    def verdict(self, shape: Shape, name: str, rows: int) -> bool:
        """Whether a member gives the class's bits at this shape, for the row counts of this bucket."""
        key = f"{shape.key}{'.bias' if shape.biased else ''} {name} {rows}"
        if key not in self._verdicts:
            self._verdicts[key] = refusal(shape, name, rows) is None
        return self._verdicts[key]

    def keep(self) -> None:
        """Writes the file."""
        if not self._kept:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self._verdicts, indent=0, sort_keys=True))
        except OSError:
            return


def _machine() -> list[str]:
    """What a certificate is for: change any of it, and certify anew."""
    if INTERPRETED:
        return ["interpreter"]
    machine = [torch.cuda.get_device_name(device()), torch.__version__, triton.__version__, str(version())]
    return [*machine, sources.digest()]


def refusal(shape: Shape, name: str, rows: int) -> str | None:
    """Certifies one member at the row counts that one bucket serves.

    Args:
        shape: the fixed axes.
        name: the member.
        rows: the bucket's most rows.

    Returns:
        Why it is no member here, with the first differing element if there is one; None for a member.
    """
    launch = members.launcher(name, shape, small_next=True)
    if launch is None:
        return "the library has no such algorithm here"
    verdict = certify(record_for(shape), Member(name, launch, STOCK), row_counts(rows))
    return None if verdict.member else str(verdict)


def row_counts(most: int) -> tuple[int, ...]:
    """Row counts that stand for a bucket: its ends, and one between."""
    at = plans.BUCKETS.index(most)
    least = plans.BUCKETS[at - 1] + 1 if at else 1
    return tuple(sorted({least, (least + most) // 2, most}))


class Linear:
    """The launcher of linear, with its plan.

    Args:
        plan: the tables; by default those that ship, and over them those made on this machine.
        certificates: what is known about this machine.
        small_next: whether small kernels follow its products, as in a model; see `linear_tile`.
    """

    def __init__(
        self,
        plan: plans.Plan | None = None,
        certificates: Certificates | None = None,
        small_next: bool = False,
    ) -> None:
        self.plan = plan or plans.current(architecture())
        self.certificates = certificates or Certificates()
        self.refused: list[str] = []
        self._small_next = small_next
        self._chosen: dict[tuple[Shape, int], Launcher] = {}

    def __call__(
        self,
        x: torch.Tensor,
        weight: DenseWeight,
        bias: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """x W^T + bias, [M, N].

        Raises:
            UnsupportedOpError: x is neither bfloat16, float16 nor float32.

        Determinism:
            Row m depends on x[m], the weight and the bias alone: the plan chooses within one bit class.
            Float32 is a class of its own, without a plan or a tensor core, which would round it to TF32.
        """
        out_dtype = out_dtype or x.dtype
        if not len(x):  # a step of which nothing is sampled; neither bulk copies nor the library know of none
            return torch.empty(0, weight.outputs, dtype=out_dtype, device=x.device)
        if x.dtype == out_dtype == torch.float32:
            return linear_float32(x, weight, bias)
        shape = Shape(weight.outputs, weight.inputs, x.dtype, out_dtype, bias is not None)
        return self.serving(shape, len(x))(x, weight, bias, out_dtype)

    def serving(self, shape: Shape, rows: int) -> Launcher:
        """What serves a product of so many rows, at least one.

        Raises:
            UnsupportedOpError: the shape's dtype is neither bfloat16 nor float16.
        """
        bucket = plans.bucket(rows) if rows <= plans.BUCKETS[-1] else _BEYOND
        return self._chosen.get((shape, bucket)) or self._launcher(shape, bucket)

    def prepare(self, shapes: Iterable[Shape], buckets: Sequence[int] = plans.BUCKETS) -> list[str]:
        """Chooses, and certifies where need be, for all row counts: once at start, before any capture.

        Args:
            shapes: that the model has.
            buckets: row counts that will come.

        Returns:
            What the plan wanted and is not certified here.
        """
        known = len(self.refused)
        for shape in shapes:
            for rows in buckets:
                self._launcher(shape, rows)
            forget()
        self.certificates.keep()
        return self.refused[known:]

    def choose(self, shape: Shape, rows: int, name: str) -> None:
        """Has a member serve a bucket from here on, whatever the plan says.

        Args:
            shape: the fixed axes.
            rows: the bucket.
            name: the member, which the caller has certified.

        Raises:
            ConfigError: nothing is written so, or the library has no such algorithm here.
        """
        launch = members.launcher(name, shape, self._small_next)
        if launch is None:
            raise ConfigError(
                f"no such member of linear at {shape.key}", expected="one that is there", got=name
            )
        self._chosen[shape, rows] = launch

    def name(self, shape: Shape, rows: int) -> str:
        """The member that serves a bucket; beyond the last a tile of ours: no other is certified there."""
        for name in self.plan.names("linear", shape.key, rows):
            if not name.startswith("lt"):
                return name
            if rows == _BEYOND:
                continue
            where = f"{name} at {shape.key}, up to {rows} rows"
            try:
                if self.certificates.verdict(shape, name, rows):
                    return name
            except torch.OutOfMemoryError:
                where += ", which there is no memory to certify"
            self.refused.append(where)
        return members.default(rows)

    def _launcher(self, shape: Shape, rows: int) -> Launcher:
        if shape.dtype not in dtypes():
            raise UnsupportedOpError(
                "linear: no certified kernel on a GPU",
                expected=" or ".join(map(str, dtypes())),
                got=shape.dtype,
                fix="convert x and the weight",
            )
        if capturing() and (shape, rows) not in self._chosen:
            # Certification waits for results, which a capture forbids. Our own tile needs none.
            return self._own(rows)
        launch = members.launcher(self.name(shape, rows), shape, self._small_next) or self._own(rows)
        self._chosen[shape, rows] = launch
        return launch

    def _own(self, rows: int) -> Launcher:
        tile = members.tile_named(members.default(rows))
        return partial(linear_tile, tile=tile, small_next=self._small_next)
