"""nano as it is trained: text tower and transformer, one loss for drawing and editing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from fluxloom.core import flow
from fluxloom.core.shapes import image_ids, pack, text_ids
from fluxloom.core.specs import ModelSpec
from fluxloom.core.text import TextTower
from fluxloom.core.transformer import Transformer

Batch = dict[str, Tensor]


class Trainee(nn.Module):
    """Text tower and transformer, trained jointly. Their names are the prefixes of the weights."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.text is not None
        self.text = TextTower(spec.text)
        self.transformer = Transformer(spec.transformer)

    def forward(self, ids: Tensor, tokens: Tensor, positions: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """Velocity [B, L, C] of all image tokens. ids [B, T], t [B]; guidance [B] where it is an input, 1: none."""
        states = self.text(ids)
        txt_ids = _text_positions(ids.shape[1], ids.device)
        given = guidance if self.transformer.spec.guidance_embed else None
        out: Tensor = self.transformer(tokens, positions, states.tokens, txt_ids, t, states.pooled, given)
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


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What chance decides for each sample: t is logit-normal, the text gives way to the empty one with probability
    ``dropout``, guidance is uniform between two values (1, 1: none)."""

    mean: float
    std: float
    dropout: float = 0.0
    guidance: tuple[float, float] = (1.0, 1.0)

    def add(self, batch: Batch, empty: Tensor, generator: torch.Generator) -> Batch:
        """The batch with noise [B, C, h, w], t [B], guidance [B], and ids [B, T] of which some are ``empty`` [T]."""
        image, device = batch["image"], batch["image"].device
        count = len(image)
        t = flow.sample_times(count, mean=self.mean, std=self.std, generator=generator)
        noise = torch.randn(image.shape, generator=generator, device=device).to(image.dtype)
        dropped = torch.rand(count, generator=generator, device=device) < self.dropout
        low, high = self.guidance
        guidance = low + (high - low) * torch.rand(count, generator=generator, device=device)
        ids = torch.where(dropped[:, None], empty, batch["ids"])
        return {**batch, "noise": noise, "t": t, "guidance": guidance, "ids": ids}


def noised(batch: Batch) -> Tensor:
    """x_t [B, L, C], packed; mixed in float32, as bfloat16 would round t by up to 0.4 %."""
    x_t = flow.interpolate(batch["image"].float(), batch["noise"].float(), batch["t"])
    return pack(x_t.to(batch["image"].dtype))


def velocity(model: nn.Module, batch: Batch, ids: Tensor, guidance: Tensor) -> Tensor:
    """The model's velocity [B, L, C] at x_t, float32. The clean tokens of a ``source`` follow with index 1."""
    x_t, (h, w) = noised(batch), batch["image"].shape[2:]
    tokens = torch.cat((x_t, pack(batch["source"])), dim=1) if "source" in batch else x_t
    positions = _positions(h, w, "source" in batch, x_t.device)
    out: Tensor = model(ids, tokens, positions, batch["t"], guidance)[:, : x_t.shape[1]]
    return out.float()


def weighted(error_BLC: Tensor, weight_BL: Tensor) -> Tensor:
    """Mean of squares, tokens weighted."""
    weight = weight_BL.float()
    loss: Tensor = (error_BLC.square().mean(-1) * weight).sum() / weight.sum()
    return loss


def flow_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Flow-matching loss of a batch to which :class:`Draw` added noise and time.

    batch: image [B, C, h, w], weight [B, L], ids [B, T], noise, t, guidance and, for edits, source [B, C, h, w].
    Source: Kontext paper, eq. 1 (arXiv 2506.15742).
    """
    target = pack(flow.target(batch["image"], batch["noise"])).float()
    return weighted(velocity(model, batch, batch["ids"], batch["guidance"]) - target, batch["weight"])


def guidance_loss(student: nn.Module, teacher: nn.Module, empty: Tensor, batch: Batch) -> Tensor:
    """The student's velocity, told the scale s, against the teacher's under classifier-free guidance of that scale.

    The teacher's two evaluations v_0 + s (v_text - v_0) become one; ``empty`` [T] are the ids of no text. The empty row
    keeps the source of an edit, as sampling does. Source: Meng et al. 2023 (arXiv 2210.03142), stage one.
    """
    ids, s = batch["ids"], batch["guidance"]
    with torch.no_grad():
        wanted = velocity(teacher, batch, ids, torch.ones_like(s))
        unwanted = velocity(teacher, batch, empty.expand_as(ids), torch.ones_like(s))
        target = unwanted + s[:, None, None] * (wanted - unwanted)
    return weighted(velocity(student, batch, ids, s) - target, batch["weight"])
