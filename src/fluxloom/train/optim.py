"""Optimisation of a module that computes in one precision and is kept in another: float32 masters, Muon for the
matrices of the blocks, AdamW for the rest, and a moving average of the masters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fluxloom.train.muon import Muon


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon is meant for it: a matrix inside the blocks, but no modulation, which does better on AdamW."""
    return p.ndim == 2 and "blocks." in name and "mod" not in name


def average_decay(step: int, ema: float) -> float:
    """Decay of a moving average that forgets its start: the horizon grows with the step until it is that of ``ema``."""
    return min(ema, (1 + step) / (10 + step))


class Optimiser:
    """Masters, moving average and both optimisers of one module."""

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        ema: float,
        clip: float,
    ) -> None:
        names, params = zip(*module.named_parameters(), strict=True)
        self.params: tuple[nn.Parameter, ...] = params
        self.names: tuple[str, ...] = names
        self.ema, self.clip, self.lr = ema, clip, lr
        self.master = [p.detach().float().clone() for p in params]
        self.average = [m.clone() for m in self.master]
        # One flat buffer of gradients: a single all-reduce, a single conversion.
        total = sum(p.numel() for p in params)
        self.gradient = torch.zeros(total, dtype=params[0].dtype, device=params[0].device)
        self.master_gradient = torch.zeros(total, device=params[0].device)
        sizes = [p.numel() for p in params]
        for p, m, g, gm in zip(
            params, self.master, self.gradient.split(sizes), self.master_gradient.split(sizes), strict=True
        ):
            p.grad, m.grad = g.view_as(p), gm.view_as(p)
        hidden = [m for n, m in zip(names, self.master, strict=True) if is_hidden_matrix(n, m)]
        rest = [m for n, m in zip(names, self.master, strict=True) if not is_hidden_matrix(n, m)]
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0, foreach=True)
        self.muon = Muon(hidden, weight_decay=weight_decay)

    def step(self, rate: float, step: int) -> Tensor:
        """One update at ``rate`` times the base learning rate; returns the gradient norm, still on the device."""
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
            self.gradient.div_(dist.get_world_size())
        self.master_gradient.copy_(self.gradient)
        norm: Tensor = self.master_gradient.norm()
        self.master_gradient.mul_((self.clip / (norm + 1e-6)).clamp_max(1.0))
        for group in self.adam.param_groups:
            group["lr"] = rate * self.lr
        self.adam.step()
        self.muon.step(rate * self.lr)
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.master)
            torch._foreach_lerp_(self.average, self.master, 1 - average_decay(step, self.ema))
        self.gradient.zero_()
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights by name, float32."""
        return dict(zip(self.names, self.average, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs."""
        return {
            "master": self.master,
            "average": self.average,
            "adam": self.adam.state_dict(),
            "muon": self.muon.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.master, state["master"])
        torch._foreach_copy_(self.average, state["average"])
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])
        torch._foreach_copy_(self.params, self.master)

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin from given weights with fresh moments: how a compact checkpoint is resumed."""
        given = [weights[name] for name in self.names]
        for copy in (self.master, self.average):
            torch._foreach_copy_(copy, [g.to(c) for g, c in zip(given, copy, strict=True)])
        torch._foreach_copy_(self.params, self.master)
