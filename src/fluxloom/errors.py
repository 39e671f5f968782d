"""One exception tree.

    FluxloomError
    ├── BadInput (ValueError)      what the user gave cannot be used; exit code 2
    │   └── UnknownModel           no such model reference
    └── Failure (RuntimeError)     something went wrong along the way; exit code 1
        ├── WeightsError           a weight file does not fit the model it was given for
        ├── ReceiptError           a picture carries no receipt, or not a true one
        └── OutputError            a result could not be written

Every message says what was got, what is allowed, and what to do.
"""

from __future__ import annotations


class FluxloomError(Exception):
    """Root of everything fluxloom raises on purpose."""

    exit_code = 1


class BadInput(FluxloomError, ValueError):
    """The input cannot be used as given."""

    exit_code = 2


class UnknownModel(BadInput):
    """No model answers to this reference."""


class Failure(FluxloomError, RuntimeError):
    """The input was fine, the work failed."""


class WeightsError(Failure):
    """Weights are missing, unknown, misshapen or damaged."""


class ReceiptError(Failure):
    """A receipt is missing, damaged or does not belong to the picture."""


class OutputError(Failure):
    """A result could not be written."""
