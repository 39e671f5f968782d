"""Other implementations, each from its own package and with our weights: none of them is a dependency.

They are imported by name when they are asked for. The weights are the same numbers in the same memory, wherever the
other layout is a view of ours.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxloom.bench.subject import Step
from fluxloom.core.transformer import Transformer
from fluxloom.weights.dialects import to_diffusers

Velocity = Callable[[Step], Tensor]
_CACHED_STEPS = 28
_SWITCHES = {"cudnn": "_native_cudnn", "fa3": "_flash_3"}  # what diffusers calls them

# How torch.compile chooses block sizes and warps of the kernels that it writes: their code and the products by cuBLAS
# stay the same. torchao asks for the descent in full, for the whole process: of the 24 kernels of FLUX.1's two kinds of
# block in fp8 it compiles and times about 330 settings one after another in one thread, 0.05 to 2.5 s of compiler each,
# and again for every new picture size. The lists hold torch's usual settings (40) and more, 105 in all, and all cores
# compile them beforehand. Counted and timed for sm_90 with torch 2.13, triton 3.6, torchao 0.18, 512 + 4,096 tokens.
_SEARCHES = {
    "lists": {"max_autotune_pointwise": True},
    "descent": {"coordinate_descent_tuning": True, "coordinate_descent_check_all_directions": True},
}


@dataclass(frozen=True)
class Rival:
    """Another implementation, set up one way.

    kind       official, diffusers or cache-dit
    compiled   its blocks through torch.compile, one graph each, for fixed shapes
    attention  "cudnn" or "fa3" by its own switch, "cudnn-held" by torch's around every call; None: as it comes
    fp8        by torchao: products of the blocks in rowwise e4m3, with fused projections
    mode       of torch.compile
    search     for launch settings of compiled kernels, "lists" or "descent"; None: the usual ones. Never with a mode
    extra      measured only if asked for by name
    steps      that one call takes: a step cache has no single step
    """

    name: str
    kind: str
    compiled: bool = False
    attention: str | None = None
    fp8: bool = False
    mode: str | None = None
    search: str | None = None
    extra: bool = False
    steps: int = 1

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules without which it cannot run."""
        own = {"official": ("fluxbfl",), "diffusers": ("diffusers",), "cache-dit": ("diffusers", "cache_dit")}
        more = (*(("torchao",) if self.fp8 else ()), *(("fa3_fwd_interface",) if self.attention == "fa3" else ()))
        return own[self.kind] + more

    @property
    def lossy(self) -> bool:
        return self.fp8 or self.kind == "cache-dit"


RIVALS = (
    Rival("official eager", "official"),
    Rival("official compiled", "official", compiled=True, extra=True),
    Rival("official compiled cudnn-held", "official", compiled=True, attention="cudnn-held"),
    Rival("diffusers eager", "diffusers"),
    Rival("diffusers eager cudnn", "diffusers", attention="cudnn", extra=True),
    Rival("diffusers compiled", "diffusers", compiled=True),
    Rival("diffusers compiled cudnn", "diffusers", compiled=True, attention="cudnn"),
    Rival("diffusers compiled cudnn-held", "diffusers", compiled=True, attention="cudnn-held"),
    Rival("diffusers compiled fa3", "diffusers", compiled=True, attention="fa3"),
    Rival("diffusers tuned cudnn", "diffusers", compiled=True, attention="cudnn",
          mode="max-autotune-no-cudagraphs", extra=True),
    Rival("diffusers fp8 compiled", "diffusers", compiled=True, fp8=True, extra=True),
    Rival("diffusers fp8 compiled cudnn", "diffusers", compiled=True, attention="cudnn", fp8=True, extra=True),
    Rival("diffusers fp8 compiled cudnn-held", "diffusers", compiled=True, attention="cudnn-held", fp8=True,
          search="lists"),
    Rival("diffusers fp8 compiled fa3", "diffusers", compiled=True, attention="fa3", fp8=True, search="lists"),
    Rival("diffusers fp8 descent cudnn-held", "diffusers", compiled=True, attention="cudnn-held", fp8=True,
          search="descent", extra=True),
    Rival("diffusers fp8 descent fa3", "diffusers", compiled=True, attention="fa3", fp8=True,
          search="descent", extra=True),
    Rival("cache-dit compiled cudnn", "cache-dit", compiled=True, attention="cudnn", steps=_CACHED_STEPS),
)  # fmt: skip


def refusal(rival: Rival, device: torch.device) -> str | None:
    """Why it cannot be measured here, in words, or None."""
    lacks = [name for name in rival.needs if find_spec(name) is None]
    if lacks:
        return f"not installed: {', '.join(lacks)}"
    if device.type != "cuda":
        wants = "FA3" if rival.attention == "fa3" else "cuDNN attention" if rival.attention else None
        wants = "fp8 products" if rival.fp8 else wants
        return f"needs a GPU for {wants}" if wants else None
    capability = torch.cuda.get_device_capability(device)
    if rival.attention == "fa3" and capability[0] != 9:
        return "FA3 needs a Hopper GPU"
    if rival.fp8 and capability < (8, 9):
        return "fp8 products need a GPU of compute capability 8.9 or more"
    return None


@dataclass
class Made:
    """A rival made ready: its velocity, what to hold around calls, and what there is to be said."""

    velocity: Velocity
    module: nn.Module
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    notes: list[str] = field(default_factory=list)

    def __call__(self, step: Step) -> Tensor:
        with self.around():
            return self.velocity(step)


def make(rival: Rival, ours: Transformer) -> Made:
    """Set a rival up with the weights of ``ours``, which lies on its device in its dtype."""
    if rival.kind == "official":
        return _official(rival, ours)
    made = _diffusers(rival, ours)
    return _cached(made) if rival.kind == "cache-dit" else made


# --------------------------------------------------------------------------------------------------------- official


def _official(rival: Rival, ours: Transformer) -> Made:
    model = import_module("fluxbfl.model")
    with torch.device("meta"):
        twin = model.Flux(model.FluxParams(**asdict(ours.spec)))
    twin.load_state_dict(ours.state_dict(), assign=True)  # strict: the names are the same
    twin.eval().requires_grad_(False)
    if rival.compiled:
        for block in (*twin.double_blocks, *twin.single_blocks):
            block.compile(fullgraph=True, dynamic=False, mode=rival.mode)

    def velocity(step: Step) -> Tensor:
        given, device = step.given, step.img.device
        out: Tensor = twin(
            img=step.img,
            img_ids=given.img_ids,
            txt=given.txt,
            txt_ids=given.txt_ids,
            timesteps=torch.tensor(step.t, device=device, dtype=step.img.dtype),
            y=given.pooled,
            guidance=_guidance(step),
        )
        return out

    return Made(velocity, twin, _around(rival))


def _around(rival: Rival) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What is held around calls. Under it scaled_dot_product_attention runs on cuDNN or not at all, also where it is
    traced by a compiler."""
    if rival.attention == "cudnn-held":
        return lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    return contextlib.nullcontext


def _guidance(step: Step) -> Tensor | None:
    given = step.given
    if given.guidance is None:
        return None
    return torch.tensor(given.guidance, device=step.img.device, dtype=step.img.dtype)


# -------------------------------------------------------------------------------------------------------- diffusers


def _diffusers(rival: Rival, ours: Transformer) -> Made:
    if rival.attention == "fa3":
        _offer_fa3()
    spec = ours.spec
    with torch.device("meta"):
        twin = import_module("diffusers").FluxTransformer2DModel(
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.depth,
            num_single_layers=spec.depth_single_blocks,
            attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads,
            joint_attention_dim=spec.context_in_dim,
            pooled_projection_dim=spec.vec_in_dim,
            guidance_embeds=spec.guidance_embed,
            axes_dims_rope=tuple(spec.axes_dim),
        )
    twin.load_state_dict(to_diffusers(ours.state_dict(), spec), assign=True)
    twin.eval().requires_grad_(False)
    made = Made(_diffusers_velocity(twin), twin, _around(rival))
    if rival.fp8:
        made.notes.append(_eight_bits(twin, rival.search))
    if rival.attention in _SWITCHES:  # before compiling: compiled code keeps the backend that it was traced with
        twin.set_attention_backend(_SWITCHES[rival.attention])
    if rival.compiled:
        options = _SEARCHES[rival.search] if rival.search else None
        twin.compile_repeated_blocks(fullgraph=True, dynamic=False, mode=rival.mode, options=options)
    return made


def _diffusers_velocity(twin: nn.Module) -> Velocity:
    def velocity(step: Step) -> Tensor:
        given = step.given
        out: Tensor = twin(
            hidden_states=step.img,
            encoder_hidden_states=given.txt,
            pooled_projections=given.pooled,
            timestep=torch.tensor(step.t, device=step.img.device, dtype=step.img.dtype),
            img_ids=given.img_ids[0],
            txt_ids=given.txt_ids[0],
            guidance=_guidance(step),
            return_dict=False,
        )[0]
        return out

    return velocity


def _offer_fa3() -> None:
    """Let diffusers find FA3 in the package fa3-fwd: it looks for the name of the original build. Only before its
    attention is first imported."""
    sys.modules.setdefault("flash_attn_interface", import_module("fa3_fwd_interface"))
    vars(import_module("diffusers.utils.import_utils"))["_flash_attn_3_available"] = True


def _eight_bits(twin: Any, search: str | None) -> str:
    """Products of the blocks in rowwise e4m3; the layers of modulation and around the blocks stay, as in ours."""
    quantization = import_module("torchao.quantization")
    twin.fuse_qkv_projections()
    for module in list(twin.modules()):  # what the fused projections replace would only take memory
        if getattr(module, "fused_projections", False):
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if hasattr(module, name):
                    delattr(module, name)
    count = 0

    def wanted(module: nn.Module, name: str) -> bool:
        nonlocal count
        fits = isinstance(module, nn.Linear) and "transformer_blocks." in name and ".norm" not in name
        count += fits
        return fits

    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(),
        set_inductor_config=False,  # the rival's search says it, for its blocks alone
    )
    quantization.quantize_(twin, config, filter_fn=wanted)
    launches = f"searched by {search}" if search else "the usual ones"
    return f"{count} linear layers in e4m3 by torchao, rows scaled; launch settings {launches} (torchao's own: descent)"


# -------------------------------------------------------------------------------------------------------- cache-dit


def _cached(made: Made) -> Made:
    """With its default step cache over a whole path of 28 Euler steps: a single step cannot show a cache."""
    cache_dit = import_module("cache_dit")
    cache_dit.enable_cache(made.module, cache_config=cache_dit.DBCacheConfig(num_inference_steps=_CACHED_STEPS))
    inner = made.velocity

    def velocity(step: Step) -> Tensor:
        cache_dit.refresh_context(made.module, num_inference_steps=_CACHED_STEPS, verbose=False)
        x, targets = step.img, step.given.targets
        for k in range(_CACHED_STEPS):
            t = tuple(1 - k / _CACHED_STEPS for _ in step.t)
            v = inner(Step(x, t, step.given))
            x = torch.cat((x[:, :targets] - v[:, :targets] / _CACHED_STEPS, x[:, targets:]), dim=1)
        cached = [len(found.cached_steps) for found in cache_dit.summary(made.module, logging=False)]
        made.notes[:] = [
            f"DBCache's defaults: {max(cached, default=0)} of {_CACHED_STEPS} steps cached in the last run; how many "
            "depends on weights, and random ones are unlike any others"
        ]
        return v

    return Made(velocity, made.module, made.around, made.notes)
