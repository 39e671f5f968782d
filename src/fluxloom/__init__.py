"""fluxloom: a complete, open implementation of the FLUX.1 image system.

    import fluxloom as fl
    pipe = fl.load("nano")
    picture = pipe.generate("a red bicycle on the beach at sunset", seed=7)
    edited = pipe.edit(picture, "make the bicycle blue")

Names resolve lazily (PEP 562): importing the package loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fluxloom.api import Loom, load
    from fluxloom.errors import BadInput, Failure, FluxloomError
    from fluxloom.infer.loras import Lora
    from fluxloom.infer.request import Reference, Request, Result

_HOMES = {
    "load": "fluxloom.api",
    "Loom": "fluxloom.api",
    "Lora": "fluxloom.infer.loras",
    "Request": "fluxloom.infer.request",
    "Reference": "fluxloom.infer.request",
    "Result": "fluxloom.infer.request",
    "FluxloomError": "fluxloom.errors",
    "BadInput": "fluxloom.errors",
    "Failure": "fluxloom.errors",
}

__all__ = [
    "BadInput",
    "Failure",
    "FluxloomError",
    "Loom",
    "Lora",
    "Reference",
    "Request",
    "Result",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fluxloom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
