"""A finding: how bad, what was seen, and what helps."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Severity: TypeAlias = Literal["ok", "look", "problem"]


class Finding(NamedTuple):
    """One thing that was looked at."""

    severity: Severity
    subject: str
    text: str
    """What was seen, with its numbers."""
    advice: str = ""
    """What helps; empty where nothing has to be done."""
    family: str = ""
    """The family of a mixture that it is about."""


def graded(value: float, look: float, problem: float) -> Severity:
    """How bad a number is that should be low."""
    return "problem" if not value < problem else "look" if value >= look else "ok"
