"""Row 2: the one door to numbers. Everything above computes through an `Ops`."""

from isobatch.ops.cpu import certified_ops, stock_ops
from isobatch.ops.ops import Ops

__all__ = ["Ops", "certified_ops", "stock_ops"]
