"""The layout that all CPU kernels share."""

from __future__ import annotations

from isobatch.kernels.attention.cache import KVCache
from isobatch.kernels.layout import Layout
from isobatch.kernels.linear.weight import PackedWeight

CPU = Layout(weight=PackedWeight, cache=KVCache)
