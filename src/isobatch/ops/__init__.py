"""Row 2: the one door to numbers. Everything above computes through an `Ops`."""

from isobatch.ops.ops import Ops, certified_ops, stock_ops

__all__ = ["Ops", "certified_ops", "stock_ops"]
