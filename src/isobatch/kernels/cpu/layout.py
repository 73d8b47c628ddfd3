"""The layouts that CPU kernels share."""

from __future__ import annotations

from isobatch.kernels.attention.cache import KVCache
from isobatch.kernels.layout import Layout
from isobatch.kernels.linear.weight import PackedStack, PackedWeight, WidenedStack, WidenedWeight

CPU = Layout(weight=PackedWeight, cache=KVCache, stack=PackedStack)
WIDENED = Layout(weight=WidenedWeight, cache=KVCache, stack=WidenedStack)
"""For members that define what a coded weight has to give: theirs is widened when it is filled."""
