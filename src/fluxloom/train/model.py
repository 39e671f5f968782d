"""nano as it is trained: text tower and transformer, one loss for drawing and editing."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from fluxloom.core import flow
from fluxloom.core.shapes import image_ids, pack, text_ids
from fluxloom.core.specs import ModelSpec
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer


class Trainee(nn.Module):
    """Text tower and transformer, trained jointly. Their names are the prefixes of the weights."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.text is not None
        self.text = TextTower(spec.text)
        self.transformer = Transformer(spec.transformer)

    def forward(self, ids: Tensor, tokens: Tensor, positions: Tensor, t: Tensor) -> Tensor:
        """Velocity [B, L, C] of all image tokens. Guidance, where it is an input, is 1: unguided."""
        states = self.text(ids)
        guidance = torch.ones_like(t) if self.transformer.spec.guidance_embed else None
        txt_ids = _text_positions(ids.shape[1], ids.device)
        out: Tensor = self.transformer(tokens, positions, states.tokens, txt_ids, t, states.pooled, guidance)
        return out

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights; blocks start as the identity, by zero modulation and output (DiT, Peebles & Xie 2023)."""
        for name, p in self.named_parameters():
            if p.ndim < 2 and not name.endswith("scale") and "norm" not in name:
                p.zero_()
            elif p.ndim >= 2:
                nn.init.normal_(p, std=0.02 if name.endswith(("token.weight", "position")) else p.shape[1] ** -0.5)
        for name, p in self.named_parameters():
            if any(part in name for part in ("_mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear")):
                p.zero_()


# A copy from the host waits for all work before it: positions are made once and kept on the device.
@lru_cache(16)
def _positions(h: int, w: int, with_source: bool, device: torch.device) -> Tensor:
    return torch.cat([image_ids(h, w, index) for index in range(1 + with_source)])[None].to(device)


@lru_cache(16)
def _text_positions(length: int, device: torch.device) -> Tensor:
    return text_ids(length)[None].to(device)


def flow_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    mean: float,
    std: float,
    dropout: float,
    empty: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Weighted flow-matching loss of a batch of latents.

    batch: image [B, C, h, w], weight [B, L], ids [B, T] and, for edits, source [B, C, h, w] (clean reference tokens
    with index 1). t ~ logit-normal(mean, std); texts give way to ``empty`` [T] with probability ``dropout``.
    Source: Kontext paper, eq. 1 (arXiv 2506.15742).
    """
    image, device = batch["image"], batch["image"].device
    count, _, h, w = image.shape
    t = flow.sample_times(count, mean=mean, std=std, generator=generator)
    noise = torch.randn(image.shape, generator=generator, device=device).to(image.dtype)
    x_t = pack(flow.interpolate(image, noise, t.to(image.dtype)))
    target = pack(flow.target(image, noise)).float()
    dropped = torch.rand(count, generator=generator, device=device) < dropout
    ids = torch.where(dropped[:, None], empty, batch["ids"])

    tokens = x_t
    if "source" in batch:
        tokens = torch.cat((x_t, pack(batch["source"])), dim=1)
    v = model(ids, tokens, _positions(h, w, "source" in batch, device), t)[:, : x_t.shape[1]]
    error = (v.float() - target).square().mean(-1)
    weight = batch["weight"].float()
    loss: Tensor = (error * weight).sum() / weight.sum()
    return loss
