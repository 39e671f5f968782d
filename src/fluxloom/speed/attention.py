"""Who computes attention: backends with what each of them takes, and how fast it was seen to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxloom.errors import BadInput
from fluxloom.speed import twins
from fluxloom.speed.ops import ops_for

# q [B, L_q, N, D], k and v [B, L_k, N, D], token-major views of any strides, to [B, L_q, N D]. Never with a mask.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_FA3 = "fa3_fwd_interface"  # of the package fa3-fwd: the forward pass of FlashAttention 3 (arXiv:2407.08608)


@dataclass(frozen=True)
class Backend:
    """One way to attend.

    refuses  why it cannot take (a tensor like the queries, the head dimension), or None
    lossy    whether it rounds its inputs further than they are
    takes    dtype in which it takes queries and keys where they can be had so (:func:`twins.placed`), or None
    """

    name: str
    attend: Attend
    refuses: Callable[[Tensor, int], str | None]
    lossy: bool = False
    takes: torch.dtype | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)  # kernels lay it out as the queries are: no copy


def _by(kernel: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(q, k, v)

    return attend


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _first(import_module(_FA3).flash_attn_func(q, k, v))
    return out.flatten(2)


def _fa3_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Inputs in e4m3: queries and keys, which come out of norms, as they are; values with a scale for every head."""
    codes, scale = ops_for(v.device).by_head(v)
    q, k = twins.unscaled(q), twins.unscaled(k)
    out: Tensor = _first(import_module(_FA3).flash_attn_func(q, k, codes, v_descale=scale))
    return out.to(v.dtype).flatten(2)


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _half(like: Tensor, head: int) -> str | None:
    if like.device.type != "cuda":
        return "needs a GPU"
    if like.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(like.dtype).removeprefix('torch.')}"
    return None if head % 8 == 0 and head <= 128 else f"takes head dimensions up to 128 by eights, not {head}"


def _hopper(like: Tensor, head: int) -> str | None:
    if refused := _half(like, head):
        return refused
    if like.dtype != torch.bfloat16:  # others are left out of the package
        return "needs bfloat16"
    if torch.cuda.get_device_capability(like.device)[0] != 9:
        return "needs a Hopper GPU"
    return None if find_spec(_FA3) else "needs the package fa3-fwd"


def _gpu(like: Tensor, head: int) -> str | None:
    return None if like.device.type == "cuda" else "needs a GPU"


def _cudnn(like: Tensor, head: int) -> str | None:
    if refused := _half(like, head):
        return refused
    return None if torch.cuda.get_device_capability(like.device)[0] >= 8 else "needs an Ampere GPU or a newer one"


# The first that takes the model is chosen, unless another is asked for. TFLOP/s in bfloat16 on one H200 at 4608 and at
# 8704 tokens, held for half a second (torch 2.11): fa3 691 and 693, cudnn 633 and 635, flash 336 and 345, efficient 166
# and 178. A step takes 117.7 ms with fa3, 118.7 with cudnn; with a reference 255.2 and 262.4.
# (bench/results/2026-11-22-h200-peers.json)
BACKENDS = (
    Backend("fa3", _fa3, _hopper),
    Backend("cudnn", _by(SDPBackend.CUDNN_ATTENTION), _cudnn),
    Backend("flash", _by(SDPBackend.FLASH_ATTENTION), _half),
    Backend("efficient", _by(SDPBackend.EFFICIENT_ATTENTION), _gpu),
    Backend("torch", _sdpa, lambda like, head: None),
    Backend("math", _by(SDPBackend.MATH), lambda like, head: None),
    Backend("fa3-fp8", _fa3_fp8, _hopper, lossy=True, takes=twins.CODES),
)
NAMES = ("auto", *(backend.name for backend in BACKENDS))


def begun(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Callable[[], Tensor]]:
    """Attention in three moves, for those that have a ``begin`` as they exchange tensors with others: what they need is
    on its way; called, they attend, and what comes of it is on its way; called again, it is here. What is computed
    between is computed beside. All others do nothing before they are asked to attend.
    """
    begin: Callable[..., Callable[[], Callable[[], Tensor]]] | None = getattr(attend, "begin", None)
    if begin is not None:
        return begin(q, k, v)

    def middle() -> Callable[[], Tensor]:
        attended = attend(q, k, v)
        return lambda: attended

    return middle


def backend_for(like: Tensor, head: int, name: str = "auto") -> Backend:
    """The backend for tensors of the device and dtype of ``like`` and heads of a dimension.

    Raises BadInput for an unknown name, and for one that does not take them.
    """
    if name not in NAMES:
        raise BadInput(f"got attention {name!r}, allowed {', '.join(NAMES)}, try auto")
    for backend in BACKENDS:
        if name in ("auto", backend.name):
            refused = backend.refuses(like, head)
            if refused is None:
                return backend
            if name != "auto":
                raise BadInput(f"got attention {name!r}, which {refused}, try auto")
    raise AssertionError("the plain backend takes everything")
