"""Tuned tables that ship with the package, one file per architecture; `isobatch tune` makes them."""
