"""Training of the small VAE: sharp pictures through latents that are nearly a unit normal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder, sample_posterior
from fluxloom.core.specs import AutoencoderSpec
from fluxloom.core.text import SPECIALS, Tokenizer
from fluxloom.train.data import Chunks, DataSpec, load_chunks, to_unit
from fluxloom.train.optim import average_decay


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun:
    """A run on pictures of the world, one chunk a step."""

    spec: AutoencoderSpec
    data: DataSpec
    steps: int
    minutes: float | None = None
    lr: float = 2e-3
    kl: float = 3e-4
    gradient: float = 0.5
    ema: float = 0.999
    seed: int = 0
    workers: int = 14
    dtype: torch.dtype = torch.bfloat16
    compile: bool = True


def reconstruction_loss(out: Tensor, x: Tensor, gradient: float) -> Tensor:
    """L1 of the pixels plus L1 of their horizontal and vertical differences, which keeps edges sharp."""
    loss = (out - x).abs().mean()
    for axis in (-1, -2):
        loss = loss + gradient * (out.diff(dim=axis) - x.diff(dim=axis)).abs().mean()
    return loss


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the unit normal, per latent value."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def fit_autoencoder(
    run: AutoencoderRun, device: torch.device, log: Callable[[dict[str, float]], None] | None = None
) -> Autoencoder:
    """Train on this device and return the averaged autoencoder, float32, on the CPU."""
    torch.manual_seed(run.seed)
    model = Autoencoder(run.spec).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.lr, betas=(0.9, 0.99), weight_decay=0.0)
    if run.compile:
        model.encoder.compile()
        model.decoder.compile()
    unread = Tokenizer(SPECIALS, 1)  # a chunk has captions, which are not looked at here
    chunks = load_chunks(Chunks(run.data, unread, run.seed, 0, 0, run.steps), run.data.mix, run.workers)
    start = time.monotonic()
    for step in range(run.steps):
        share = max(step / run.steps, (time.monotonic() - start) / (60 * run.minutes) if run.minutes else 0.0)
        if share >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = run.lr * min(1.0, (step + 1) / 200, (1 - share) / 0.5)
        x = to_unit(next(chunks)["draw.image"], device)
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            mean, logvar = model.moments(x.contiguous(memory_format=torch.channels_last))
            out = model.decoder(sample_posterior(mean.float(), logvar.float()))
        rebuilt = reconstruction_loss(out.float(), x, run.gradient)
        kl = kl_to_normal(mean.float(), logvar.float())
        (rebuilt + run.kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 1 - average_decay(step, run.ema))
        if log is not None and step % 100 == 0:
            psnr = 10 * torch.log10(4 / F.mse_loss(out.detach().float().clamp(-1, 1), x))
            row = {"loss": rebuilt, "kl": kl, "psnr": psnr}
            log({"step": step, "seconds": time.monotonic() - start, **{k: float(v.detach()) for k, v in row.items()}})
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), average)
    finished = Autoencoder(run.spec)
    finished.load_state_dict(model.state_dict())
    return finished.eval()


@torch.no_grad()
def latent_statistics(model: Autoencoder, x: Tensor) -> tuple[float, float]:
    """(scale, shift) that make the latents of pictures x [B, 3, H, W] zero-mean and unit-variance."""
    mean, _ = model.moments(x)
    return float(1 / mean.std()), float(mean.mean())
