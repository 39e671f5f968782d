"""From a resolved request to what the loop needs: rows of conditioning, times, start states.

Legend: B batch, L tokens, C channels, h/w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fluxloom.core import flow, shapes
from fluxloom.core.specs import ModelSpec
from fluxloom.core.text import TextStates
from fluxloom.infer.pictures import resize
from fluxloom.infer.request import Resolved

Encode = Callable[[Image.Image], Tensor]  # an RGB picture to its normalised latent [1, C, h, w], float32
Read = Callable[[str], TextStates]


@dataclass(frozen=True, eq=False)
class Row:
    """Everything a velocity depends on besides x and t.

    text     states of one prompt [1, L, C]
    ids      positions [L, 3] of the target tokens, then of the context tokens
    context  reference tokens [1, L, C] that follow the target's, or None
    guidance the embedded guidance value, or None where the model has none
    """

    text: TextStates
    ids: Tensor
    context: Tensor | None
    guidance: float | None


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The inputs of ``sample.trajectory`` for every picture of a request."""

    rows: tuple[Row, ...]
    times: tuple[float, ...]
    shape: tuple[int, int, int]
    seed: int
    init: Tensor | None

    def start(self, index: int) -> Tensor:
        """Start state [1, L, C] of picture ``index``: noise of its own seed, mixed with the init picture if there is
        one.

        The noise is drawn on the CPU in float32, unpacked, so that a seed means the same picture on every device
        and in every batch.
        """
        generator = torch.Generator().manual_seed(self.seed + index)
        noise = torch.randn(1, *self.shape, generator=generator)
        z = noise if self.init is None else flow.interpolate(self.init, noise, self.times[0])
        return shapes.pack(z)


def condition(request: Resolved, spec: ModelSpec, read: Read, encode: Encode) -> Conditioning:
    """Build the conditioning of a request; ``read`` and ``encode`` are the text and picture encoders.

    A reference is seen at the nearest of the model's preferred sizes. A model without them was taught by pairs of one
    size, place by place: there it is seen at the size of the picture to draw (otherwise its upper left part is copied).

    Under true CFG a second row stands for what is not wanted: the negative or empty prompt, with the same reference
    (an edit without its picture would be another task, not less of this one).
    """
    hw = shapes.latent_hw(request.width, request.height)
    ids, context = shapes.image_ids(*hw), None
    reference = request.input("context")
    if reference is not None:
        own, sizes = reference.image.size, spec.preferred_sizes
        seen = shapes.nearest_size(*own, sizes) if sizes else (request.width, request.height)
        latent = encode(resize(reference.image, *seen))
        context = shapes.pack(latent)
        ids = torch.cat((ids, shapes.image_ids(latent.shape[2], latent.shape[3], index=1)))
    init = request.input("init")
    prompts = (request.prompt,) if request.true_cfg == 1 else (request.prompt, request.negative)
    tokens = shapes.token_count(request.width, request.height) if request.shift else None
    return Conditioning(
        rows=tuple(Row(read(prompt), ids, context, request.guidance) for prompt in prompts),
        times=tuple(flow.schedule(request.steps, tokens)[request.first_step :]),
        shape=(spec.autoencoder.z_channels, *hw),
        seed=request.seed,
        init=None if init is None else encode(resize(init.image, request.width, request.height)),
    )
