"""From words to an executor: how a loaded model is to compute, chosen for the machine that it lies on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxloom.errors import BadInput
from fluxloom.infer.executor import Executor, Plain
from fluxloom.infer.plan import LINEARS
from fluxloom.infer.runtime import Runtime

if TYPE_CHECKING:
    from fluxloom.infer.plan import Plan
    from fluxloom.speed.attention import Attend
    from fluxloom.speed.team import Team


class SpeedWarning(UserWarning):
    """Something is computed in another way than was asked for, as this machine cannot do it so."""


EXECUTORS = ("auto", "plain", "fused", "captured")


@dataclass(frozen=True)
class Recipe:
    """How to compute.

    executor   ``plain``: core's own forward pass; ``fused``: the fused sequence; ``captured``: that in CUDA graphs;
               ``auto``: captured on GPUs, plain on a processor, fused on several of them
    linears    ``fp8`` or ``int8``: the products of the blocks in 8 bits (lossy); None: as the weights are
    attention  a name of :data:`attention.BACKENDS`, or ``auto``
    """

    executor: str = "auto"
    linears: str | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise BadInput(f"got executor {self.executor!r}, allowed {', '.join(EXECUTORS)}, try auto")
        if self.linears is not None and self.linears not in LINEARS:
            raise BadInput(f"got linears {self.linears!r}, allowed {', '.join(LINEARS)}, try leaving it out")
        if self.executor == "plain" and self.attention != "auto":
            raise BadInput(f"got attention {self.attention!r} with executor 'plain', which has its own, try fused")


def apply(
    runtime: Runtime,
    recipe: Recipe,
    team: Team | None = None,
    plan: Plan | None = None,
    device: torch.device | None = None,
) -> None:
    """Let a runtime compute as a recipe says, over the GPUs of a team where there is one; with a plan on a device, into
    whose memory it fits its weights.

    8-bit linears exchange weights, which only loading anew undoes; all else is undone by another recipe. Raises
    BadInput for what this machine cannot do.
    """
    device = device or runtime.device
    if recipe.linears is not None:
        from fluxloom.speed.linear8 import quantise, supported

        form, why = supported(recipe.linears, device)
        if why:
            warnings.warn(why, SpeedWarning, stacklevel=2)
        quantise(runtime.transformer, form, device=device)
    if device.type == "cuda" and runtime.dtype == torch.bfloat16 and recipe.executor != "plain":
        from fluxloom.speed import pictures

        pictures.apply(runtime.autoencoder.to(device))
    if plan is None:
        runtime.executor = _executor(runtime, recipe, team)
        return
    from fluxloom.speed import offload

    offload.apply(runtime, plan, device, lambda blocks: _executor(runtime, recipe, None, blocks, plan.resident))


def _executor(
    runtime: Runtime,
    recipe: Recipe,
    team: Team | None,
    blocks: Iterable[nn.Module] | None = None,
    resident: bool = True,
) -> Executor:
    """``blocks``: lent one after another; ``resident``: whether the weights keep their places, as graphs want it."""
    gpu = runtime.device.type == "cuda"
    wanted = recipe.executor
    if team is not None and wanted == "plain":
        raise BadInput(f"got executor 'plain' on {team.size} GPUs, allowed fused or captured, try auto")
    if wanted == "auto":
        here = "captured" if gpu else "plain" if recipe.attention == "auto" and team is None else "fused"
        wanted = here if resident else "fused"
    if wanted == "plain":
        return Plain(runtime.transformer)
    if wanted == "captured" and not resident:
        raise BadInput("got executor 'captured' for weights that come and go, allowed for those that stay, try fused")
    if wanted == "captured" and not gpu:
        raise BadInput(f"got executor 'captured' on {runtime.device.type}, allowed on a GPU, try fused")
    from fluxloom.speed.attention import backend_for
    from fluxloom.speed.fused import Fused
    from fluxloom.speed.graphs import Captured
    from fluxloom.speed.ops import ops_for

    like = torch.empty(0, device=runtime.device, dtype=runtime.dtype)
    attend = backend_for(like, runtime.transformer.spec.head_dim, recipe.attention)

    def make(attend: Attend) -> Executor:
        fused = Fused(runtime.transformer, attend, ops_for(runtime.device), blocks)
        return Captured(fused) if wanted == "captured" else fused

    if team is not None:
        from fluxloom.speed.parallel import spread

        return spread(runtime, team, attend, make)
    return make(attend)
