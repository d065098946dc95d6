"""What the benchmarks' command lines share: lists between commas, numbers, and a progress bar."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def names(text: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def counts(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(name) for name in names(text)]


def rate(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def console_here() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else 110)


def progress_bar(console: Console) -> Progress:
    """Shows what is measured, and the time left by a rough guess."""
    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"), left)
    # The guess is from the last minutes: entrants differ, and one may take a minute.
    return Progress(*columns, console=console, speed_estimate_period=300, transient=True)
