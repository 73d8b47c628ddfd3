"""The ops, as methods of one object: validate, call the production member, show observers.

An `Ops` is made once and handed down; nothing about which kernels run is global. Shape letters: T rows
(tokens), R requests, S sampled rows, H heads, Hkv key/value heads, D head size, K inputs, N outputs,
V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch

from isobatch.errors import ShapeError
from isobatch.kernels.layout import Cache, PagedRows, Stack, StepKeys, Weight
from isobatch.kernels.log_probs.cpu import TopLogProbs
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.sampling.cpu import PenaltyRows, SamplingRows
from isobatch.ops import check
from isobatch.ops.calls import Calls


class Ops(Calls):
    """Every number above this row comes from here. Made of a table and a layout; see `Calls`."""

    def embedding(self, token_ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Rows of a weight.

        Args:
            token_ids: int64 [T], each in [0, V).
            weight: [V, K].

        Returns:
            float32 [T, K].

        Raises:
            ShapeError: wrong shape or dtype, or an id out of range.

        Determinism:
            A copy.
        """
        self._check.integers("embedding", "token_ids", token_ids, None, below=weight.outputs)
        return cast(torch.Tensor, self._run("embedding", token_ids=token_ids, weight=weight))

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias.

        Args:
            x: float32 [T, K], any strides.
            weight: [N, K].
            bias: float32 [N], or None.

        Returns:
            float32 [T, N], contiguous.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row t depends on x[t], the weight and the bias alone (kernels/linear/cpu.py).
        """
        self._check.floats("linear", "x", x, None, weight.inputs)
        if bias is not None:
            self._check.floats("linear", "bias", bias, weight.outputs)
        return cast(torch.Tensor, self._run("linear", x=x, weight=weight, bias=bias))

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """The output projection, whose results are float32 whatever the model's dtype.

        Args:
            x: [T, K] of the model's dtype, any strides.
            weight: [V, K].

        Returns:
            float32 [T, V], contiguous.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            As `linear`: the sum is the same, and not rounded to the dtype after it.
        """
        self._check.floats("logits", "x", x, None, weight.inputs)
        return cast(torch.Tensor, self._run("logits", x=x, weight=weight))

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalises rows by their root mean square, after adding a residual if there is one.

        Args:
            x: float32 [T, K].
            weight: float32 [K].
            eps: added to the mean square.
            residual: float32 [T, K], or None.

        Returns:
            (normalised rows, x + residual or x), float32 [T, K] each.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row t depends on row t of the inputs alone (kernels/rms_norm/cpu.py).
        """
        self._check.floats("rms_norm", "x", x, None, *weight.shape)
        self._check.floats("rms_norm", "weight", weight, None)
        if residual is not None:
            self._check.floats("rms_norm", "residual", residual, *x.shape)
        result = self._run("rms_norm", x=x, weight=weight, eps=eps, residual=residual)
        return cast(tuple[torch.Tensor, torch.Tensor], result)

    def rotary(
        self, x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Turns each head of each row by its position's angles.

        Args:
            x: float32 [T, H, D].
            positions: int64 [T], each in [0, C).
            cos: float32 [C, D/2].
            sin: float32 [C, D/2].

        Returns:
            float32 [T, H, D].

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row t depends on x[t] and positions[t] alone (kernels/rotary/cpu.py).
        """
        self._check.float32("rotary", "cos", cos, None, None)
        self._check.floats("rotary", "x", x, None, None, 2 * cos.shape[1])
        self._check.integers("rotary", "positions", positions, x.shape[0], below=cos.shape[0])
        self._check.float32("rotary", "sin", sin, *cos.shape)
        return cast(torch.Tensor, self._run("rotary", x=x, positions=positions, cos=cos, sin=sin))

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up.

        Args:
            gate_up: float32 [T, 2 I], gates left, ups right.

        Returns:
            float32 [T, I].

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Elementwise (kernels/activation/cpu.py).
        """
        self._check.floats("silu_and_mul", "gate_up", gate_up, None, None)
        if gate_up.shape[1] % 2:
            raise ShapeError("silu_and_mul: wrong width", expected="an even number", got=gate_up.shape[1])
        return cast(torch.Tensor, self._run("silu_and_mul", gate_up=gate_up))

    def gated(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """The first half of an MLP: silu(x gates^T) * x ups^T.

        Args:
            x: float32 [T, K], any strides.
            weight: [2 I, K], gates above ups, from `gate_up`.

        Returns:
            float32 [T, I], contiguous.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            As `linear` and then `silu_and_mul`, bit for bit; where no kernel has both, these two run.
        """
        if "gated" not in self._table:
            return self.silu_and_mul(self.linear(x, weight))
        self._check.floats("gated", "x", x, None, weight.inputs)
        return cast(torch.Tensor, self._run("gated", x=x, weight=weight))

    def moe(self, x: torch.Tensor, experts: Experts[Weight, Stack]) -> torch.Tensor:
        """A mixture of experts: the router, each token's experts, and the sum of their results.

        Args:
            x: float32 [T, K], any strides.
            experts: of the layer.

        Returns:
            float32 [T, K].

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row t depends on x[t] and the weights alone: not on which experts the other rows go to, or how
            many rows an expert gets (kernels/moe/cpu.py).
        """
        self._check.floats("moe", "x", x, None, experts.router.inputs)
        return cast(torch.Tensor, self._run("moe", x=x, experts=experts))

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: Cache, rows: PagedRows) -> None:
        """Stores keys and values in their slots.

        Args:
            key: float32 [T, Hkv, D].
            value: float32 [T, Hkv, D].
            cache: of the layer.
            rows: where each row goes.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            A copy.
        """
        self._check.floats("write_kv", "key", key, None, None, None)
        self._check.floats("write_kv", "value", value, *key.shape)
        self._run("write_kv", key=key, value=value, cache=cache, rows=rows)

    def qk_norm_rotary_write(
        self,
        qkv: torch.Tensor,
        heads: int,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache,
        rows: PagedRows,
        q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[torch.Tensor, StepKeys | None]:
        """From a layer's projection to what attention needs: normalises, turns, stores keys and values.

        Args:
            qkv: [T, (H + 2 Hkv) D] of the model's dtype.
            heads: H.
            positions: int64 [T], each in [0, C).
            cos: float32 [C, D/2].
            sin: float32 [C, D/2].
            cache: of the layer; gets the keys and values.
            rows: where each row's go.
            q_weight: [D], of the norm over each query head, or None for models without.
            k_weight: [D], likewise; both or none.
            eps: of the norms.

        Returns:
            The queries, [T, H, D]; and for `attention` the step's own keys and values, where it has a use for
            them.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            As the chain of `rms_norm`, `rotary` and `write_kv`, bit for bit; where no kernel fuses them, that
            chain is what runs.
        """
        T, D = qkv.shape[0], 2 * cos.shape[1]
        if "qk_norm_rotary_write" not in self._table:
            packed = qkv.view(T, -1, D)
            kv_heads = (packed.shape[1] - heads) // 2
            turned, v = packed.split_with_sizes((heads + kv_heads, kv_heads), 1)
            if q_weight is not None and k_weight is not None:
                q, k = turned.split_with_sizes((heads, kv_heads), 1)
                parts = [
                    self.rms_norm(part.flatten(0, 1), weight, eps)[0].view(part.shape)
                    for part, weight in ((q, q_weight), (k, k_weight))
                ]
                turned = torch.cat(parts, 1)
            turned = self.rotary(turned, positions, cos, sin)
            q, k = turned.split_with_sizes((heads, kv_heads), 1)
            self.write_kv(k, v, cache, rows)
            return q, None
        self._check.floats("qk_norm_rotary_write", "qkv", qkv, None, None)
        self._check.integers("qk_norm_rotary_write", "positions", positions, T, below=cos.shape[0])
        for name, table in (("cos", cos), ("sin", sin)):
            self._check.float32("qk_norm_rotary_write", name, table, None, D // 2)
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight is not None:
                self._check.floats("qk_norm_rotary_write", name, weight, D)
        result = self._run(
            "qk_norm_rotary_write", qkv=qkv, positions=positions, cos=cos, sin=sin, cache=cache, rows=rows,
            q_weight=q_weight, k_weight=k_weight, eps=eps,
        )  # fmt: skip
        return cast("tuple[torch.Tensor, StepKeys | None]", result)

    def attention(
        self, q: torch.Tensor, cache: Cache, rows: PagedRows, scale: float, own: StepKeys | None = None
    ) -> torch.Tensor:
        """Causal grouped-query attention over paged keys and values.

        Args:
            q: float32 [T, H, D].
            cache: of the layer, with this step's own keys and values already written.
            rows: whose queries these are.
            scale: of the scores, usually 1 / sqrt(D).
            own: what `qk_norm_rotary_write` returned beside q: the same numbers as in the cache, to be read
                in whichever place is nearer.

        Returns:
            float32 [T, H, D].

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row t depends on its query, and its request's keys and values up to its position: not on the
            block table, the chunk it came in, or whether it is prefill or decode (kernels/attention/cpu.py).
        """
        self._check.floats("attention", "q", q, None, None, None)
        for name, part in zip(("own keys", "own values"), own or (), strict=False):
            self._check.floats("attention", name, part, q.shape[0], None, q.shape[2])
        nearer = {} if own is None else {"own": own}
        return cast(torch.Tensor, self._run("attention", q=q, cache=cache, rows=rows, scale=scale, **nearer))

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every token.

        Args:
            logits: float32 [S, V].

        Returns:
            float32 [S, V].

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row s depends on logits[s] alone (kernels/log_probs/cpu.py).
        """
        self._check.float32("log_softmax", "logits", logits, None, None)
        return cast(torch.Tensor, self._run("log_softmax", logits=logits))

    def top_log_probs(self, logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopLogProbs:
        """Log-probability and rank of one token per row, and the likeliest `count`.

        Args:
            logits: float32 [S, V].
            chosen: int64 [S].
            count: from 0 to V.

        Returns:
            TopLogProbs; ties go to the lower token id.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row s depends on logits[s], chosen[s] and count alone; a token's value not on count.
        """
        self._check.float32("top_log_probs", "logits", logits, None, None)
        self._check.integers("top_log_probs", "chosen", chosen, len(logits), below=logits.shape[1])
        if not 0 <= count <= logits.shape[1]:
            raise ShapeError("top_log_probs: bad count", expected=f"0..{logits.shape[1]}", got=count)
        return cast(TopLogProbs, self._run("top_log_probs", logits=logits, chosen=chosen, count=count))

    def penalize(self, logits: torch.Tensor, rows: PenaltyRows) -> torch.Tensor:
        """Applies repetition, frequency and presence penalties.

        Args:
            logits: float32 [S, V].
            rows: what each row has seen.

        Returns:
            float32 [S, V], a copy.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row s depends on row s of the inputs alone.
        """
        self._check.float32("penalize", "logits", logits, None, None)
        check.rows("penalize", rows, len(logits))
        return cast(torch.Tensor, self._run("penalize", logits=logits, rows=rows))

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """Chooses a token per row.

        Args:
            logits: float32 [S, V].
            rows: each row's parameters, seed and position.

        Returns:
            int64 [S]; -1 where a row of logits holds NaN or infinity.

        Raises:
            ShapeError, UnsupportedOpError: an argument of the wrong shape, dtype or device.

        Determinism:
            Row s depends on logits[s] and its parameters, seed and position alone.
        """
        self._check.float32("sample", "logits", logits, None, None)
        check.rows("sample", rows, len(logits))
        return cast(torch.Tensor, self._run("sample", logits=logits, rows=rows))
