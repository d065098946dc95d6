"""Checks of what a user wrote; each names the argument, its value and the rule."""

from __future__ import annotations

import math


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and above zero (or zero, where that is allowed)."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} ({value}) must be a finite number {'>=' if zero else '>'} 0")


def check_fraction(name: str, value: float) -> None:
    """Raise ``ValueError`` unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} ({value}) must be in [0, 1)")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number, at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} ({value}) must be a whole number >= {least}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` unless low <= value <= high (never true of NaN)."""
    if not low <= value <= high:
        raise ValueError(f"{name} ({value}) must be in [{low}, {high}]")
