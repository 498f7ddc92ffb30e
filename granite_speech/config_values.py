"""Checks of values, which configurations and options share.

A check takes a value and returns what was expected in its place, or None if the value is right.
"""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

__all__ = ["ACTIVATIONS", "activation_name", "boolean", "checked", "integer", "number", "optional", "shown"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")

Check = Callable[[Any], str | None]


def integer(low: int | None = None, high: int | None = None) -> Check:
    """From low to high, both included; a bool is not an integer here."""
    bounds = ("" if low is None else f" from {low}") + ("" if high is None else f" to {high}")

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool)
        right = right and (low is None or low <= value) and (high is None or value <= high)
        return None if right else f"an integer{bounds}"

    return check


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Check:
    """A finite number from low to high, which are excluded if open."""
    lower = "above" if open_low else "at least" if open_high else "from"
    upper = "and below" if open_high else "and at most" if open_low else "to"
    bounds = ("" if low == -math.inf else f" {lower} {low:g}") + ("" if high == math.inf else f" {upper} {high:g}")

    def check(value: Any) -> str | None:
        # Comparisons exclude NaN and infinities; math.isfinite would overflow on a very large integer.
        right = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
        right = right and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        return None if right else f"a finite number{bounds}"

    return check


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def activation_name(value: Any) -> str | None:
    return None if value in ACTIVATIONS else f"one of {', '.join(ACTIVATIONS)}"


def shown(value: Any) -> str:
    """A value as errors quote it: shortened, or its type if Python refuses to print it (an integer of thousands of digits)."""
    try:
        return f"{value!r:.100}"
    except ValueError:
        return f"a very long {type(value).__name__}"


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def checked(default: Any, check: Check) -> Any:
    """A dataclass field with a check in its metadata."""
    return field(default=default, metadata={"check": check})
