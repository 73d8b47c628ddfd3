"""The ops by the CPU's kernels: certified ones, or torch's own."""

from __future__ import annotations

from isobatch.kernels.attention.cpu import write_kv
from isobatch.kernels.attention.stock import write_kv as stock_write_kv
from isobatch.kernels.catalogue import RECORDS
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.stock import STOCK
from isobatch.ops.environment import require_ieee
from isobatch.ops.ops import Ops


def certified_ops() -> Ops:
    """The production members of every record: bits that depend on the request alone.

    Raises:
        FloatEnvironmentError: this process flushes subnormal numbers, so its bits would be others.

    Determinism:
        Each op states its own; the members of an op agree to the bit, so which one serves is of no account.
    """
    require_ieee()
    table = {name: record.member(record.production).function for name, record in RECORDS.items()}
    return Ops("isobatch", {**table, "logits": table["linear"], "write_kv": write_kv}, CPU)


def stock_ops() -> Ops:
    """torch's own kernels, for comparison: bits that depend on the load."""
    table = {name: record.stock.function for name, record in RECORDS.items()}
    return Ops("stock", {**table, "logits": table["linear"], "write_kv": stock_write_kv}, STOCK)
