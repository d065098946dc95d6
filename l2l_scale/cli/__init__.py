"""The command line: ``l2l-scale COMMAND`` (the roof: it may import every floor, and does so late)."""

from l2l_scale.cli.main import main

__all__ = ["main"]
