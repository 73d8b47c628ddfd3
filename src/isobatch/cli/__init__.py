"""Row 7: the command line. `isobatch --help` says what there is."""

from isobatch.cli.main import main

__all__ = ["main"]
