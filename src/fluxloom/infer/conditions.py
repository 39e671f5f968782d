"""From a resolved request to what the loop needs: rows of conditioning, times, start states.

Legend: B batch, L tokens, C channels, h/w latent cells, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

from fluxloom.core import flow, shapes
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import ModelSpec
from fluxloom.core.text import TextStates
from fluxloom.infer import canvas
from fluxloom.infer.control import MAPS
from fluxloom.infer.loras import ResolvedLora
from fluxloom.infer.pictures import resize, to_tensor
from fluxloom.infer.request import Input, Resolved

# An RGB picture, or one as a tensor [1, 3, H, W] in [-1, 1], to its normalised latent [1, C, h, w], float32: the mean
# that the encoder gives, never a draw (official since June 2025; diffusers draws for Fill, Control, image to image).
Encode = Callable[[Image.Image | Tensor], Tensor]
Read = Callable[..., TextStates]  # a prompt, and by name ``prompt_t5`` and ``text_length``: as ``reading.Reader.read``
See = Callable[[Image.Image], Tensor]  # an RGB picture to text tokens [1, L, C]

Place = tuple[int, int, int]  # of a reference's first token: (index, row, column)


@dataclass(frozen=True, eq=False)
class Row:
    """Everything a velocity depends on besides x and t.

    text     states of one prompt [1, L, C], and behind them the tokens of pictures that stand for words
    ids      positions [L, 3] of the target tokens, then of the context tokens
    context  reference tokens [1, L, C] that follow the target's, or None
    guidance the embedded guidance value, or None where the model has none
    channels [1, L, C'] that stand beside x's channels at every step, or None
    loras    that act on the model, as facts: whoever evaluates has their tensors
    times    at which velocities will be asked for, as far as the solver tells
    """

    text: TextStates
    ids: Tensor
    context: Tensor | None
    guidance: float | None
    channels: Tensor | None = None
    loras: tuple[ResolvedLora, ...] = ()
    times: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Known:
    """Places where the path is known beforehand: there it is the straight line from noise to a given picture.

    velocity  [1, L, C] of that line: noise - picture
    share     [1, L, C]: 1 where it is known, 0 where the model decides, or between
    """

    velocity: Tensor
    share: Tensor

    def hold(self, velocity: Tensor) -> Tensor:
        """A model's velocity [B, L, C] with the known one in its places: every solver then walks the line there."""
        return torch.lerp(velocity, self.velocity.to(velocity), self.share.to(velocity))

    def to(self, device: torch.device) -> Known:
        """The same on a device."""
        return Known(self.velocity.to(device), self.share.to(device))


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The inputs of ``sample.trajectory`` for every picture of a request.

    init  latent [1, C, h, w] of the picture to start from or to keep parts of, or None
    keep  [1, 1, h, w]: 1 where init stays as it is; None: nowhere
    """

    rows: tuple[Row, ...]
    times: tuple[float, ...]
    shape: tuple[int, int, int]
    seed: int
    init: Tensor | None
    keep: Tensor | None = None

    def start(self, index: int) -> Tensor:
        """Start state [1, L, C] of picture ``index``: noise of its own seed, mixed with the init picture if there is
        one.

        The noise is drawn on the CPU in float32, unpacked, so that a seed means the same picture on every device
        and in every batch.
        """
        noise = self._noise(index)
        z = noise if self.init is None else flow.interpolate(self.init, noise, self.times[0])
        return shapes.pack(z)

    def known(self, index: int) -> Known | None:
        """Of picture ``index``, what is known of its path."""
        if self.init is None or self.keep is None:
            return None
        velocity = flow.target(self.init, self._noise(index))
        return Known(shapes.pack(velocity), shapes.pack(self.keep.expand_as(velocity)))

    def _noise(self, index: int) -> Tensor:
        return torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(self.seed + index))


def condition(request: Resolved, spec: ModelSpec, read: Read, encode: Encode, see: See | None = None) -> Conditioning:
    """Build the conditioning of a request; ``read`` and ``encode`` are the text and picture encoders, ``see`` turns
    pictures into words.

    References are seen at the nearest of the model's preferred sizes. A model without them was taught by pairs of one
    size, place by place: there they are seen at the size of the picture to draw (otherwise its upper left part is
    copied).

    Under true CFG a second row stands for what is not wanted: the negative or empty prompt, with the same pictures
    (an edit without its picture would be another task, not less of this one) and the same LoRAs (as in diffusers).
    """
    hw = shapes.latent_hw(request.width, request.height)
    context, places = _references(request, spec, encode)
    ids = torch.cat((shapes.image_ids(*hw), *places))
    laid = _canvas(request)
    fills = request.task == "fill"
    channels = _beside(request, spec, encode, laid if fills else None)
    texts = [read(request.prompt, prompt_t5=request.prompt_t5, text_length=request.text_length)]
    if request.true_cfg != 1:
        texts.append(read(request.negative, text_length=request.text_length))
    seen = _seen(request, see)
    tokens = shapes.token_count(request.width, request.height) if request.shift else None
    times = tuple(flow.schedule(request.steps, tokens)[request.first_step :])
    foresee = SOLVERS[request.solver].evaluations
    asked = tuple(foresee(times)) if foresee is not None else ()
    # A Fill model is told its picture by channels; it starts from it only where a strength says so.
    started = laid is not None and (not fills or request.strength is not None)
    return Conditioning(
        rows=tuple(
            Row(_after(text, seen), ids, context, request.guidance, channels, request.loras, asked) for text in texts
        ),
        times=times,
        shape=(spec.autoencoder.z_channels, *hw),
        seed=request.seed,
        init=encode(laid.picture) if laid is not None and started else None,
        keep=1 - canvas.mask_cells(laid.mask) if laid is not None and request.repaints and not fills else None,
    )


def _canvas(request: Resolved) -> canvas.Canvas | None:
    """The init picture with its mask and margins, at the size to draw."""
    init, mask = request.input("init"), request.input("mask")
    if init is None:
        return None
    marked = None if mask is None else mask.image
    return canvas.lay(init.image, marked, request.expand, request.width, request.height)


# ---------------------------------------------------------------------------------------------- references


def by_index(sizes: Sequence[tuple[int, int]]) -> list[Place]:
    """Each reference on a plane of its own, 1, 2, 3 ... (Batifol et al. 2025). ``sizes``: (rows, columns) of tokens."""
    return [(index, 0, 0) for index in range(1, len(sizes) + 1)]


def by_offset(sizes: Sequence[tuple[int, int]]) -> list[Place]:
    """All references on plane 1, each beside or below those before, whichever keeps the whole nearer to a square (as
    ComfyUI places them unless told otherwise). ``sizes``: (rows, columns) of tokens."""
    places, height, width = [], 0, 0
    for rows, columns in sizes:
        row, column = (0, width) if rows + height > columns + width else (height, 0)
        places.append((1, row, column))
        height, width = max(height, row + rows), max(width, column + columns)
    return places


POSITIONS: Mapping[str, Callable[[Sequence[tuple[int, int]]], list[Place]]] = MappingProxyType(
    {"index": by_index, "offset": by_offset}
)


def _references(request: Resolved, spec: ModelSpec, encode: Encode) -> tuple[Tensor | None, list[Tensor]]:
    """Tokens [1, L, C] of all references, and the position ids [L, 3] of each."""
    found = request.all_of("context")
    if not found:
        return None, []
    latents = []
    for reference in found:
        own, sizes = reference.image.size, spec.preferred_sizes
        seen = shapes.nearest_size(*own, sizes) if sizes else (request.width, request.height)
        latents.append(encode(resize(reference.image, *seen)))
    cells = [(latent.shape[2], latent.shape[3]) for latent in latents]
    places = POSITIONS[request.positions]([(h // shapes.PATCH, w // shapes.PATCH) for h, w in cells])
    ids = [shapes.image_ids(h, w) + torch.tensor(place) for (h, w), place in zip(cells, places, strict=True)]
    return torch.cat([shapes.pack(latent) for latent in latents], dim=1), ids


# ---------------------------------------------------------------------------------------------- channels and words


def _beside(request: Resolved, spec: ModelSpec, encode: Encode, filled: canvas.Canvas | None) -> Tensor | None:
    """Channels [1, L, C'] beside x's: for Fill the picture without what is repainted, then the mask; for control
    the latent of edges or depth."""
    if filled is not None:
        return torch.cat((shapes.pack(encode(filled.masked())), canvas.mask_tokens(filled.mask)), dim=-1)
    control = request.input("control")
    return None if control is None else shapes.pack(encode(_control(request, control, spec)))


def _control(request: Resolved, control: Input, spec: ModelSpec) -> Tensor:
    """The control picture [1, 3, H, W] in [-1, 1] at the size to draw; made from a picture there, not before
    (official), unless it is ready."""
    picture = resize(control.image, request.width, request.height)
    if request.control_ready:
        return to_tensor(picture)
    assert spec.control is not None, "the request was checked"
    return MAPS[spec.control](picture, request.control_model)


def _seen(request: Resolved, see: See | None) -> list[Tensor]:
    """Tokens of the pictures that stand for words, by their weights; a weight of 1 is the official one."""
    found = request.all_of("image")
    assert see is not None or not found, "a model with the task redux has a vision tower"
    return [picture.weight * see(picture.image) for picture in found] if see is not None else []


def _after(text: TextStates, seen: list[Tensor]) -> TextStates:
    """States of a prompt with the tokens of pictures after them; the pooled state is that of the words alone."""
    if not seen:
        return text
    return TextStates(torch.cat((text.tokens, *(one.to(text.tokens) for one in seen)), dim=1), text.pooled)
