"""Values of a request: of the right kind and within limits, or refused."""

from __future__ import annotations

from typing import Any

from fluxloom.errors import BadInput


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """A whole number within limits. Raises BadInput."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed a whole number, try leaving it out")
    if (low is not None and value < low) or (high is not None and value > high):
        only = f"only {low}" if low == high else f"{low} to {high}"
        nearest = low if low is not None and value < low else high
        raise BadInput(f"got {name} {value}, allowed {only}, try {nearest}")
    return value


def number(name: str, value: object, low: float, high: float) -> float:
    """A number within limits. Raises BadInput."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed a number, try leaving it out")
    if not low <= value <= high:  # nor is NaN
        raise BadInput(f"got {name} {value}, allowed {low:g} to {high:g}, try {low if value < low else high:g}")
    return float(value)


def flag(name: str, value: object) -> bool:
    """True or false, and nothing that only looks so. Raises BadInput."""
    if not isinstance(value, bool):
        raise BadInput(f"got {name} {value!r}, allowed true or false, try leaving it out")
    return value


def either(value: Any, default: Any) -> Any:
    """The value, or the default where there is none; zero is a value."""
    return default if value is None else value
