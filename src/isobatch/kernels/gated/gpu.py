"""The first half of an MLP as it serves on the GPU: in one kernel where the product's is ours, else in two.

Linear's plan chooses for the product as for any other. A tile of ours joins its gates and ups before it
stores them; a library's kernel stores them, and an elementwise one joins them. Both are of one bit class.
"""

from __future__ import annotations

import torch

from isobatch.kernels.activation.triton import silu_and_mul
from isobatch.kernels.gpu.paired import TURN, PairedWeight
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.triton import gated_tile
from isobatch.kernels.stock import DenseWeight


class Gated:
    """The launcher of the first half of an MLP.

    Args:
        linear: chooses the product's member.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    def __call__(self, x: torch.Tensor, weight: PairedWeight | DenseWeight) -> torch.Tensor:
        """silu(x gates^T) * x ups^T.

        Args:
            x: bfloat16 or float16 [M, K].
            weight: [2 I, K] of the same dtype. Where I is no multiple of eight gates lie above ups.

        Returns:
            [M, I].

        Determinism:
            Row m depends on x[m] and the weight alone: the plan chooses within one bit class.
        """
        if isinstance(weight, DenseWeight):
            return silu_and_mul(self._linear(x, weight))
        if len(x):
            shape = Shape(weight.outputs, weight.inputs, x.dtype, x.dtype)
            tile = self._linear.serving(shape, len(x)).keywords.get("tile")
            if tile is not None:
                return gated_tile(x, weight, tile=tile)
        return silu_and_mul(self._linear(x, weight.turns), turn=TURN)
