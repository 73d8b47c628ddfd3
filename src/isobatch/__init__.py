"""isobatch: the same prompt gives the same bits, whatever else the machine is doing."""

from isobatch._version import __version__

__all__ = ["__version__"]
