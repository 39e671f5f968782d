"""Ways to compute a step, by words joined with "+": an executor, 8-bit linears, an attention backend, a dtype.

``captured+fp8+fa3-fp8`` is a recipe of :mod:`fluxloom.speed.recipe`; ``compiled`` (each block through torch.compile),
``onnx`` and ``openvino`` stand beside, to be compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from fluxloom.bench import subject
from fluxloom.bench.subject import Step
from fluxloom.errors import BadInput
from fluxloom.infer.executor import Executor, Plain
from fluxloom.infer.plan import LINEARS
from fluxloom.infer.runtime import DTYPES, Runtime, dtype_named
from fluxloom.speed.attention import BACKENDS
from fluxloom.speed.recipe import EXECUTORS, Recipe, apply

FOREIGN = ("compiled", "onnx", "openvino")
PARTS = {
    "executor": tuple(name for name in EXECUTORS if name != "auto") + FOREIGN,
    "linears": LINEARS,
    "attention": tuple(backend.name for backend in BACKENDS),
    "dtype": tuple(DTYPES),
}
# What is measured where nothing is asked for; what cannot run says why.
USUAL = {
    "cuda": (
        "plain", "compiled", "fused", "captured+cudnn", "captured+fa3", "captured+fp8", "captured+fp8+fa3-fp8",
        "captured+int8",
    ),
    "cpu": (
        "plain+float32", "plain+bfloat16", "fused+float32", "fused+bfloat16", "fused+int8", "compiled+float32",
        "compiled+bfloat16", "onnx", "openvino",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A way by its parts; those that are None are what :mod:`fluxloom.speed.recipe` takes by itself, and the dtype the
    device's own."""

    name: str
    executor: str = "plain"
    linears: str | None = None
    attention: str | None = None
    dtype: str | None = None

    @property
    def lossy(self) -> bool:
        """Whether it rounds further than the dtype does, by its own account."""
        return self.linears is not None or any(one.lossy for one in BACKENDS if one.name == self.attention)


def way(text: str) -> Way:
    """``fused+bfloat16`` in parts. Raises BadInput for words that nothing is called, and for two of a kind."""
    found: dict[str, str] = {}
    for word in text.strip().split("+"):
        kinds = [kind for kind, words in PARTS.items() if word in words and kind not in found]
        if not kinds:
            allowed = ", ".join(word for words in PARTS.values() for word in words)
            raise BadInput(f"got recipe {text!r}, allowed one each of {allowed}, joined with +, try fused+bfloat16")
        found[kinds[0]] = word
    one = Way(text.strip(), **found)
    if one.executor in (*FOREIGN, "plain") and (one.attention or (one.linears and one.executor != "plain")):
        raise BadInput(f"got recipe {text!r}, allowed attention and 8 bits with fused and captured, try fused+fp8")
    return one


def ways(words: Sequence[str], device: torch.device) -> list[Way]:
    """Those that were asked for, or the usual ones of a device."""
    return [way(word) for word in words or USUAL[device.type]]


def refusal(one: Way, found: Runtime) -> str | None:
    """Why a way cannot be measured here, or None."""
    if one.executor in ("onnx", "openvino"):
        return _foreign_refusal(one, found)
    if one.executor == "compiled" and found.device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs Triton"
    dtype, head = _dtype(one, found), found.spec.transformer.head_dim
    like = torch.empty(0, device=found.device, dtype=dtype)
    for backend in BACKENDS:
        if one.attention == backend.name and (refused := backend.refuses(like, head)):
            return f"attention {backend.name} {refused}"
    if one.executor == "captured" and found.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return None


def _foreign_refusal(one: Way, found: Runtime) -> str | None:
    if found.device.type != "cpu":
        return f"{one.executor} is measured on processors only"
    needs = ("onnxruntime", "onnx", "onnxscript") if one.executor == "onnx" else ("openvino",)
    lacks = [name for name in needs if find_spec(name) is None]
    return f"not installed: {', '.join(lacks)}" if lacks else None


def _dtype(one: Way, found: Runtime) -> torch.dtype:
    return dtype_named(one.dtype, found.device)


@dataclass(frozen=True)
class Ready:
    """A way made ready: what computes, and in which dtype."""

    executor: Executor | Callable[..., Tensor]
    dtype: torch.dtype

    def __call__(self, step: Step) -> Tensor:
        """The velocity [B, L, C] of at least the target's tokens; ``step`` in this dtype."""
        return self.executor(step.img, step.t, step.given)


def ready(one: Way, found: Runtime, step: Step) -> Ready:
    """Set a way up on a copy of the model that shares its numbers. ``step``: an example, where an exporter wants one.

    Raises what goes wrong on the way: BadInput for what this machine cannot do, and whatever a compiler raises.
    """
    dtype = _dtype(one, found)
    own = subject.reshaped(found, dtype)
    if one.executor in ("onnx", "openvino"):
        from fluxloom.bench.foreign import MAKERS

        return Ready(MAKERS[one.executor](own.transformer, step.to(dtype)), dtype)
    if one.executor == "compiled":
        for block in (*own.transformer.double_blocks, *own.transformer.single_blocks):
            block.compile(fullgraph=True, dynamic=False)
        return Ready(Plain(own.transformer), dtype)
    apply(own, recipe(one))
    return Ready(own.executor, dtype)


def recipe(one: Way) -> Recipe:
    """The recipe that :mod:`fluxloom.speed` is to follow."""
    if one.executor in FOREIGN:
        raise BadInput(f"got recipe {one.name!r}, allowed those of {', '.join(EXECUTORS)}, try fused")
    given = {item.name: getattr(one, item.name) for item in fields(Recipe) if getattr(one, item.name, None)}
    return replace(Recipe(), **given)
