"""The `lumaris` command."""

from lumaris.cli.root import main

__all__ = ["main"]
