"""Rectified flow: the straight path from data to noise, its velocity, and where along it to look.

t = 0 is data, t = 1 is noise; x_t = (1 - t) x + t e; the network predicts v = dx_t/dt = e - x
(Liu et al. 2022, Lipman et al. 2022; in this form Esser et al. 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The shift is linear in the token count through these two points (official sampling code).
_TOKENS = (256, 4096)
_MU = (0.5, 1.15)


def interpolate(x: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t on the straight path. A tensor t [B] broadcasts over the trailing axes of x [B, ...]."""
    t = _broadcast(t, x)
    return (1 - t) * x + t * noise


def target(x: Tensor, noise: Tensor) -> Tensor:
    """The velocity the network learns: v = e - x."""
    return noise - x


def estimate_x0(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The data end of the line through x_t with velocity v."""
    return x_t - _broadcast(t, x_t) * v


def estimate_noise(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The noise end of the line through x_t with velocity v."""
    return x_t + (1 - _broadcast(t, x_t)) * v


def shift_mu(tokens: int) -> float:
    """Shift of a picture of so many *target* tokens (a reference does not count): mu(1024) = 0.63."""
    slope = (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])
    return _MU[0] + slope * (tokens - _TOKENS[0])


def shift(t: float, mu: float) -> float:
    """t' = e^mu / (e^mu + 1/t - 1): more of the path is spent where noise is high."""
    return 0.0 if t == 0 else math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def schedule(steps: int, tokens: int | None = None) -> list[float]:
    """steps + 1 times from 1 to 0, shifted for so many *target* tokens (None: unshifted, as schnell)."""
    if steps < 1:
        raise ValueError(f"got {steps} steps; need at least 1")
    times = [1 - i / steps for i in range(steps + 1)]
    return times if tokens is None else [shift(t, shift_mu(tokens)) for t in times]


def sample_times(count: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Logit-normal times [count] for training: sigmoid(N(mean, std)). To shift by mu, add mu to the mean."""
    device = generator.device if generator is not None else None
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))


def _broadcast(t: Tensor | float, x: Tensor) -> Tensor | float:
    return t.view(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) and t.ndim == 1 else t
