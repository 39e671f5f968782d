"""Tiny members of the family, every kind of weight away from its default, and one way to run them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.flow import schedule
from fluxloom.core.shapes import image_ids, text_ids
from fluxloom.core.solvers import Need, euler
from fluxloom.core.specs import AutoencoderSpec, TransformerSpec
from fluxloom.core.transformer import Transformer

TEXT_TOKENS = 7
LATENT = (6, 10)  # latent cells (h, w), not square: 15 tokens
REFERENCE = (8, 4)  # of another shape: 8 tokens


def shrink(spec: TransformerSpec) -> TransformerSpec:
    """The same member at toy width: channels and guidance, which tell variants apart, stay."""
    return replace(
        spec,
        hidden_size=64,
        num_heads=2,
        axes_dim=(8, 12, 12),
        depth=2,
        depth_single_blocks=2,
        context_in_dim=24,
        vec_in_dim=20,
    )


DEV = shrink(TransformerSpec())
VAE = AutoencoderSpec(ch=32, num_res_blocks=1)  # 32 is the least that 32 groups allow


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that hide nothing: biases are not zero, norm scales are not one, and activations stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise
        parameter.data = value
    return module.eval().requires_grad_(False)


def transformer(spec: TransformerSpec, seed: int) -> Transformer:
    module = randomise(Transformer(spec), seed)
    assert isinstance(module, Transformer)
    return module


def autoencoder(spec: AutoencoderSpec, seed: int) -> Autoencoder:
    module = randomise(Autoencoder(spec), seed)
    assert isinstance(module, Autoencoder)
    return module


def inputs(spec: TransformerSpec, seed: int, *, reference: bool = False, batch: int = 2) -> dict[str, Tensor]:
    """Arguments of ``Transformer.forward``; each member of the batch has its own time and guidance."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = image_ids(*LATENT)
    if reference:
        ids = torch.cat((ids, image_ids(*REFERENCE, index=1)))
    out = {
        "img": draw(batch, len(ids), spec.in_channels),
        "img_ids": ids.expand(batch, -1, -1),
        "txt": draw(batch, TEXT_TOKENS, spec.context_in_dim),
        "txt_ids": text_ids(TEXT_TOKENS).expand(batch, -1, -1),
        "t": torch.tensor([0.871, 0.125])[:batch],
        "pooled": draw(batch, spec.vec_in_dim),
    }
    return out | ({"guidance": torch.tensor([3.5, 30.0])[:batch]} if spec.guidance_embed else {})


@dataclass
class Journey:
    """A whole trajectory: start noise, conditioning, and what Kontext (tokens) or Fill (channels) adds."""

    spec: TransformerSpec
    noise: Tensor
    txt: Tensor
    pooled: Tensor
    steps: int
    shift: bool
    guidance: float = 3.5
    reference: Tensor | None = None
    channels: Tensor | None = None


def journey(spec: TransformerSpec, seed: int, *, reference: bool = False, shift: bool = True) -> Journey:
    generator = torch.Generator().manual_seed(2000 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = LATENT[0] * LATENT[1] // 4
    extra = spec.in_channels - spec.out_channels
    return Journey(
        spec=spec,
        noise=draw(1, tokens, spec.out_channels),
        txt=draw(1, TEXT_TOKENS, spec.context_in_dim),
        pooled=draw(1, spec.vec_in_dim),
        steps=6,
        shift=shift,
        reference=draw(1, REFERENCE[0] * REFERENCE[1] // 4, spec.out_channels) if reference else None,
        channels=draw(1, tokens, extra) if extra else None,
    )


def times(trip: Journey) -> list[float]:
    return schedule(trip.steps, trip.noise.shape[1] if trip.shift else None)


def travel(model: Transformer, trip: Journey) -> list[Tensor]:
    """Every x of an Euler trajectory, the last one being the answer."""
    ids = image_ids(*LATENT)
    if trip.reference is not None:
        ids = torch.cat((ids, image_ids(*REFERENCE, index=1)))

    def velocity(x: Tensor, t: float) -> Tensor:
        img = x if trip.channels is None else torch.cat((x, trip.channels), dim=-1)
        if trip.reference is not None:
            img = torch.cat((img, trip.reference), dim=1)
        guidance = torch.tensor([trip.guidance]) if trip.spec.guidance_embed else None
        text = text_ids(TEXT_TOKENS)[None]
        v = model(img, ids[None], trip.txt, text, torch.tensor([t]), trip.pooled, guidance)
        out: Tensor = v[:, : x.shape[1]]
        return out

    return walk(velocity, trip.noise, times(trip))


def walk(velocity: Callable[[Tensor, float], Tensor], x: Tensor, at: Sequence[float]) -> list[Tensor]:
    """Drive Euler's solver; every x it took."""
    run = euler(x, at)
    event = next(run)
    path = [x]
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(event, Need):
                event = run.send(velocity(event.x, event.t))
            else:
                path.append(event.x)
                event = next(run)
    return path


def relative(got: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got - expected).abs().max() / expected.abs().max())
