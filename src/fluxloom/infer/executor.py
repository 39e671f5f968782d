"""How a velocity is computed, behind one call: the contract of executors, and the plain one.

An executor computes what :class:`fluxloom.core.transformer.Transformer` computes, from the same weights, another way:
fused, captured, streamed, spread over GPUs. Those are in :mod:`fluxloom.speed`; inference knows them by this alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fluxloom.core.transformer import Transformer


@dataclass(frozen=True, eq=False)
class Given:
    """What stays the same from step to step, on the device: whoever keeps what follows from it keys it by identity.

    txt       [B, L_txt, C], with ``txt_ids`` [B, L_txt, 3]
    img_ids   [B, L_img, 3]: the target's tokens, then those of references
    pooled    [B, C_vec]
    guidance  one value a member of the batch, or None where the model embeds none
    targets   how many of the image tokens are the target's: an executor may leave the others out of its answer
    times     at which velocities will be asked for, as far as is known; others may come
    adapted   whether LoRAs hang on the modules during these steps
    """

    txt: Tensor
    txt_ids: Tensor
    img_ids: Tensor
    pooled: Tensor
    guidance: tuple[float, ...] | None
    targets: int
    times: tuple[float, ...] = ()
    adapted: bool = False


class Executor(Protocol):
    """Velocities of one model.

    name   for receipts: what computed a picture, in a word or two
    lossy  whether it computes anything else than the model's velocity, beyond rounding
    """

    name: str
    lossy: bool

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        """Velocity [B, targets or L_img, C_out] of image tokens [B, L_img, C_in], each member at its own time."""


class Plain:
    """The reference: the transformer's own ``forward``."""

    name, lossy = "plain", False

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer

    def __call__(self, img: Tensor, t: Sequence[float], given: Given) -> Tensor:
        guidance = None if given.guidance is None else torch.tensor(given.guidance, device=img.device)
        times = torch.tensor(t, device=img.device)
        out: Tensor = self.transformer(img, given.img_ids, given.txt, given.txt_ids, times, given.pooled, guidance)
        return out
