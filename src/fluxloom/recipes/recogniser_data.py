"""What the recogniser learns from: scenes with their truth, things spoilt on purpose, and trips through a VAE.

Worker processes render scenes (:class:`Pictures`); the training device spoils one thing in a fifth of them
(:func:`spoil`), sends half of them through nano's autoencoder and keeps them in a ring, from which each is drawn a few
times, every time with other light, noise and blur (:class:`Ring`).

Legend: B pictures, H = W = 256 pixels, h = w = 16 cells, K = 4 things at most in a picture, G letters at most.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fluxloom import world
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.measure.recogniser import CELLS, HEADS, LETTERS, NONE, OWN, SIDE
from fluxloom.train.data import load_chunks, to_unit
from fluxloom.train.model import Batch
from fluxloom.world.colours import COLOURS
from fluxloom.world.mix import draw_scene
from fluxloom.world.render import SIGN_MARK, lettering_width, sign_box
from fluxloom.world.scene import FILTERS, PLACES, SEASONS, TIMES, WALLS, WEATHERS
from fluxloom.world.words import SIGN_WORDS

THINGS = 4
LONGEST = 7  # letters of a made-up word
UNSEEN = -1  # a label that cannot be known, and is not asked for
CLEAR, UNCLEAR, ABSENT = 1, 0, -1  # states of a thing
NOTHING_AT, SIGN_AT, UNCLEAR_AT = 0, THINGS + 1, THINGS + 2  # planes of the cells' shares; things lie between
SMALLEST = 300  # pixels; less of a thing than this is no thing
KINDS = ("warp", "shuffle", "blend", "blur", "latent")  # ways to spoil a thing

SHADES = (OWN, *COLOURS)
LABELS: dict[str, tuple[str, ...]] = {
    "place": tuple(PLACES),
    "time": (NONE, *TIMES),
    "weather": (NONE, *WEATHERS),
    "season": (NONE, *SEASONS),
    "style": (*world.STYLES, *world.RESERVED_STYLES),
    "filter": (NONE, *FILTERS),
    "hue": (NONE, *WALLS),
}


@lru_cache(1)
def concepts() -> tuple[str, ...]:
    """Keys of the world's things; a thing's place among them is its class."""
    return tuple(world.load_atlas().concepts)


def broad_mix() -> world.Mix:
    """Nothing rare: every light and weather, filters and signs often, the reserved style in one picture of ten."""
    return world.Mix(
        large=0.30, medium=0.16, two=0.34, three=0.12, four=0.08, sign=0.42, filter=0.25, recolour=0.55, plain=0.12,
        times=(0.31, 0.23, 0.23, 0.23), clear=0.35, styles=(*((s, 1.0) for s in world.STYLES), ("line", 0.33)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PictureSpec:
    """What is rendered: a broad mix, held-out combinations included, ``count`` pictures a chunk."""

    count: int = 64
    mix: world.Mix = field(default_factory=broad_mix)
    empty: float = 0.04  # scenes without things
    words: float = 0.4  # signs with a word of the world's list; the rest are letters at random
    jpeg: float = 0.15


class Pictures(Dataset[Batch]):
    """Chunk ``index``: a pure function of (spec, seed, index)."""

    def __init__(self, spec: PictureSpec, seed: int, count: int) -> None:
        self.spec, self.seed, self.count = spec, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"recogniser/{self.seed}/{index}")
        rows = [self._row(rng) for _ in range(self.spec.count)]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, rng: random.Random) -> dict[str, np.ndarray]:
        scene = sample_scene(rng, self.spec)
        picture = world.render(scene, SIDE)
        pixels = picture.pixels
        if rng.random() < self.spec.jpeg:
            pixels = _through_jpeg(pixels, rng.randrange(55, 96))
        return {"image": pixels, "marks": picture.items, **truth(scene)}


def sample_scene(rng: random.Random, spec: PictureSpec) -> world.Scene:
    """A scene of the mix, whether its combinations are held out from nano's training or not."""
    scene = draw_scene(rng, spec.mix, "test")
    if rng.random() < spec.empty:
        scene = replace(scene, items=())
    if scene.sign and rng.random() > spec.words:
        scene = replace(scene, sign=_respelled(rng, scene.sign))
    return scene


def _respelled(rng: random.Random, sign: world.Sign) -> world.Sign:
    """Other letters on the same sign, on a board no wider than before: its neighbours stand where they stood."""
    room = sign.letters * (lettering_width(sign.text) + 0.9)
    while True:
        text = _nonsense(rng)
        letters = min(sign.letters, room / (lettering_width(text) + 0.9))
        if letters >= 0.072:
            return replace(sign, text=text, letters=letters)


def _nonsense(rng: random.Random) -> str:
    """Letters at random, or a word of the list misspelt in one place: so that a reader learns to look."""
    if rng.random() < 0.35:
        word = list(rng.choice(SIGN_WORDS))
        at = rng.randrange(len(word))
        word[at : at + rng.randrange(2)] = rng.choices(string.ascii_uppercase, k=rng.choice((1, 1, 2)))
        return "".join(word[:LONGEST])
    return "".join(rng.choices(string.ascii_uppercase, k=rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7))))


def _through_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    _, file = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]


def truth(scene: world.Scene) -> dict[str, np.ndarray]:
    """Labels of a scene: ids and colours [K], heads [7], box [4] and letters [G] of the sign (0 after the last).

    A thing repainted to the colour that it has by itself counts as not repainted: nobody could tell. A line drawing
    on white paper does not show time, weather, season or wall.
    """
    ids = np.full(THINGS, UNSEEN, np.int64)
    colours = np.full(THINGS, UNSEEN, np.int64)
    for k, item in enumerate(scene.items):
        ids[k] = concepts().index(item.concept)
        own = item.colour is None or item.colour == world.load_atlas().concept(item.concept).natural
        colours[k] = 0 if own else SHADES.index(item.colour or OWN)
    behind = scene.backdrop
    said = {
        "place": behind.place, "time": behind.time, "weather": behind.weather, "season": behind.season,
        "style": scene.style, "filter": scene.filter, "hue": behind.hue,
    }  # fmt: skip
    heads = [LABELS[name].index(said[name] or NONE) for name in HEADS]
    if scene.style == "line":
        heads = [
            UNSEEN if name in ("time", "weather", "season", "hue") else k for name, k in zip(HEADS, heads, strict=True)
        ]
    letters = np.zeros(LONGEST, np.int64)
    if scene.sign:
        letters[: len(scene.sign.text)] = [LETTERS.index(letter) + 1 for letter in scene.sign.text]
    return {
        "ids": ids,
        "colours": colours,
        "heads": np.array(heads, np.int64),
        "box": np.array(sign_box(scene.sign) if scene.sign else (0, 0, 0, 0), np.float32),
        "letters": letters,
    }


def load_pictures(pictures: Pictures, workers: int) -> Iterator[Batch]:
    """Chunks in order, rendered ahead by ``workers`` processes (0: here)."""
    return load_chunks(pictures, pictures.spec.mix, workers, ahead=4)


# ------------------------------------------------------------------------------------------------ spoiling


@dataclass(frozen=True)
class Spoilt:
    """Pictures after :func:`spoil`: what is left of them, and what they still show."""

    image: Tensor  # [B, 3, H, W] in [-1, 1]
    shares: Tensor  # [B, K + 3, h, w]: nothing, the things, sign, unclear; the rest of a cell is not asked for
    state: Tensor  # [B, K]: CLEAR, UNCLEAR or ABSENT
    melt: Tensor  # [B, 1, H, W]: where the latents are still to be spoilt
    kind: Tensor  # [B]: how something was spoilt, by place in KINDS, or -1


def spoil(x: Tensor, marks: Tensor, ids: Tensor, share: float, generator: torch.Generator) -> Spoilt:
    """Spoil one of the things (ids [B, K]) in a ``share`` of pictures x [B, 3, H, W] with marks [B, H, W].

    A spoilt thing is warped by 10-25 % of its size, cut up and shuffled, blended with a thing of like colours, blurred
    away, or left to be melted among the latents. The others are bent by less than 2.5 %, and keep their names.
    """
    count, device = len(x), x.device
    each = torch.arange(count, device=device)
    masks = torch.stack([marks == k for k in (*range(1, THINGS + 1), SIGN_MARK)], 1).float()  # [B, K + 1, H, W]
    present = masks[:, :THINGS].sum((2, 3)) >= SMALLEST
    lucky = torch.rand(count, THINGS, generator=generator, device=device) * present
    at = lucky.argmax(1)
    spoilt = present.any(1) & (torch.rand(count, generator=generator, device=device) < share)
    kind = torch.multinomial(
        torch.tensor([0.34, 0.14, 0.26, 0.12, 0.14], device=device), count, replacement=True, generator=generator
    )
    kind = torch.where(spoilt, kind, -1)
    mask = masks[each, at][:, None]
    target = Target.of(mask)
    soft = F.avg_pool2d(F.max_pool2d(mask, 13, 1, 6), 9, 1, 4)

    grid = _warped(target, soft, kind == 0, generator)
    grid = _shuffled(grid, target, kind == 1, generator)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    masks = F.grid_sample(masks, grid, mode="nearest", align_corners=False)
    own, concept = masks[each, at][:, None], ids[each, at]
    x, covered = _blended(x, own, concept, target, kind == 2, generator)
    x = _blurred(x, target, soft, kind == 3, generator)

    # Neighbours that lie where things were cut up or covered are neither clear nor unclear: nobody asks for them.
    harmed = torch.where((kind == 1)[:, None, None, None], target.box_mask, covered)
    overlap = (masks[:, :THINGS] * harmed).sum((2, 3)) / masks[:, :THINGS].sum((2, 3)).clamp_min(1)
    is_target = F.one_hot(at, THINGS).bool()
    visible = masks[:, :THINGS].sum((2, 3)) >= SMALLEST
    state = torch.where(visible & present & ((overlap < 0.08) | is_target), CLEAR, ABSENT)
    state = torch.where(is_target & spoilt[:, None] & present, UNCLEAR, state)

    wrecked = torch.maximum(own, covered) * spoilt[:, None, None, None]
    masks = masks * (1 - wrecked)
    nothing = 1 - masks.sum(1, keepdim=True) - wrecked
    masks[:, :THINGS] *= (state != ABSENT)[:, :, None, None]
    shares = F.avg_pool2d(torch.cat((nothing, masks, wrecked), 1), SIDE // CELLS)
    return Spoilt(x, shares, state, soft * (kind == 4)[:, None, None, None], kind)


@dataclass(frozen=True)
class Target:
    """Where the thing to be spoilt lies: left, top, width, height [B] in shares, and the pixels of that box."""

    left: Tensor
    top: Tensor
    wide: Tensor
    high: Tensor
    box_mask: Tensor  # [B, 1, H, W]
    u: Tensor  # [B, 1, H, W], place in the box from 0 to 1
    v: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Target:
        at = (torch.arange(SIDE, device=mask.device) + 0.5) / SIDE
        columns, rows = mask[:, 0].amax(1), mask[:, 0].amax(2)  # [B, W], [B, H]

        def span(line: Tensor) -> tuple[Tensor, Tensor]:
            low = torch.where(line > 0, at, 2.0).amin(1)
            high = torch.where(line > 0, at, -1.0).amax(1)
            return low.clamp(0, 1), (high - low).clamp(0.02, 1)

        (left, wide), (top, high) = span(columns), span(rows)
        v, u = torch.meshgrid(at, at, indexing="ij")
        u = ((u - left[:, None, None]) / wide[:, None, None])[:, None]
        v = ((v - top[:, None, None]) / high[:, None, None])[:, None]
        inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
        return cls(left, top, wide, high, inside.float(), u, v)

    @property
    def size(self) -> Tensor:
        return torch.maximum(self.wide, self.high)


def _identity(device: torch.device) -> Tensor:
    at = (torch.arange(SIDE, device=device) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack((x, y), -1)[None]


def _noise(count: int, channels: int, nodes: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Smooth noise [B, channels, H, W] of about unit variance through so many nodes a side."""
    raw = torch.randn(count, channels, nodes, nodes, generator=generator, device=device)
    return F.interpolate(raw, (SIDE, SIDE), mode="bicubic") * 1.3


def _warped(target: Target, soft: Tensor, strong: Tensor, generator: torch.Generator) -> Tensor:
    """A sampling grid [B, H, W, 2]: strong bends on some targets, slight ones everywhere."""
    count, device = len(soft), soft.device
    # About three to six bends across the thing, whatever its size.
    fields = torch.stack([_noise(count, 2, nodes, generator, device) for nodes in (6, 10, 18)])
    finer = torch.randint(0, 2, (count,), generator=generator, device=device)
    pick = ((target.size < 0.55).long() + (target.size < 0.3).long() + finer).clamp_max(2)
    field = fields[pick, torch.arange(count, device=device)]
    low, high = torch.where(strong, 0.1, 0.0), torch.where(strong, 0.22, 0.018)
    amplitude = (low + (high - low) * torch.rand(count, generator=generator, device=device)) * target.size
    bend = field * amplitude[:, None, None, None] * soft
    slight = torch.rand(count, generator=generator, device=device) * 0.004
    bend = bend + _noise(count, 2, 8, generator, device) * slight[:, None, None, None]
    return _identity(device) + 2 * bend.permute(0, 2, 3, 1)


def _shuffled(grid: Tensor, target: Target, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """The grid with the target's box cut into 2 x 2 to 3 x 3 tiles that change places."""
    count, device = len(grid), grid.device
    side = torch.randint(2, 4, (count, 1, 1), generator=generator, device=device)
    u, v = (target.u[:, 0] * side), (target.v[:, 0] * side)
    tiles = side * side
    tile = (v.floor() * side + u.floor()).long().clamp_min(0) % tiles
    shift = 1 + (torch.rand(count, 1, 1, generator=generator, device=device) * (tiles - 1)).long()
    # Every tile takes its content from another: a turn of the whole row of tiles, then a swap of neighbours.
    source = (tile + shift) % tiles
    su = (source % side + u.frac()) / side
    sv = (source // side + v.frac()) / side
    left, top = target.left[:, None, None], target.top[:, None, None]
    moved = torch.stack((left + su * target.wide[:, None, None], top + sv * target.high[:, None, None]), -1) * 2 - 1
    where = (target.box_mask[:, 0] > 0) & chosen[:, None, None]
    return torch.where(where[..., None], moved, grid)


def _blended(
    x: Tensor, own: Tensor, concept: Tensor, target: Target, chosen: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Half of the target, or a ghost over all of it, from a thing of like colours in another picture.

    Returns the pictures and where they were covered [B, 1, H, W].
    """
    count, device = len(x), x.device
    mean = (x * own).sum((2, 3)) / own.sum((2, 3)).clamp_min(1)
    apart = torch.cdist(mean, mean) + 0.25 * torch.rand(count, count, generator=generator, device=device)
    apart = apart + 1e3 * (concept[:, None] == concept).float() + 1e3 * (own.sum((1, 2, 3)) < SMALLEST).float()
    other = apart.argmin(1)
    left, top = target.left[other, None, None], target.top[other, None, None]
    gx = left + target.u[:, 0] * target.wide[other, None, None]
    gy = top + target.v[:, 0] * target.high[other, None, None]
    grid = torch.stack((gx, gy), -1) * 2 - 1
    theirs = F.grid_sample(x[other], grid, padding_mode="border", align_corners=False)
    there = F.grid_sample(own[other], grid, align_corners=False) * target.box_mask
    angle = torch.rand(count, 1, 1, 1, generator=generator, device=device) * 2 * math.pi
    half = ((target.u - 0.5) * angle.cos() + (target.v - 0.5) * angle.sin() > 0).float()
    blobs = (_noise(count, 1, 10, generator, device) > 0).float()
    way = torch.randint(0, 3, (count, 1, 1, 1), generator=generator, device=device)
    alpha = torch.where(way == 0, half, torch.where(way == 1, blobs, 0.5)) * there * chosen[:, None, None, None]
    return x + (theirs - x) * alpha, (alpha > 0.3).float()


def _blurred(x: Tensor, target: Target, soft: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """The target blurred over about an eighth of its size."""
    out = x
    more = torch.rand(len(x), generator=generator, device=x.device) * 0.08 + 0.10
    width = target.size * SIDE * more
    for factor, low, high in ((8, 0, 11), (16, 11, 22), (32, 22, 999)):
        rough = F.interpolate(F.avg_pool2d(x, factor), (SIDE, SIDE), mode="bicubic")
        where = (chosen & (width >= low) & (width < high))[:, None, None, None] * soft
        out = out + (rough - out) * where
    return out


# ------------------------------------------------------------------------------------------------ the ring


@torch.no_grad()
def round_trip(vae: Autoencoder, spoilt: Spoilt, noise: float, generator: torch.Generator) -> Tensor:
    """Pictures through the autoencoder; some with noise of up to ``noise`` on their latents, which are of unit
    variance, and melted where they are to be."""
    x = spoilt.image
    dtype = next(vae.parameters()).dtype
    z = vae.encode(x.to(dtype)).float()
    count = len(z)
    level = (torch.rand(count, 1, 1, 1, generator=generator, device=z.device) * 3 - 2).clamp_min(0) * noise
    z = z + level * torch.randn(z.shape, generator=generator, device=z.device)
    coarse = torch.randn(*z.shape[:2], z.shape[2] // 2, z.shape[3] // 2, generator=generator, device=z.device)
    melt = F.interpolate(spoilt.melt, z.shape[2:], mode="area")
    strength = 0.6 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator, device=z.device)
    z = z * (1 - 0.35 * melt) + strength * melt * F.interpolate(coarse, z.shape[2:], mode="bilinear")
    return vae.decode(z.to(dtype)).float().clamp(-1, 1)


def prepare(
    chunk: Batch, vae: Autoencoder | None, spoil_share: float, trips: float, generator: torch.Generator
) -> Batch:
    """A rendered chunk as the network takes it, on the generator's device: image uint8 [B, 3, H, W], shares, state and
    the labels. The first ``trips`` of the pictures go through the autoencoder, if one is given."""
    device = generator.device
    x = to_unit(chunk["image"], device)
    spoilt = spoil(x, chunk["marks"].to(device), chunk["ids"].to(device), spoil_share, generator)
    image = spoilt.image
    count = round(trips * len(x)) if vae is not None else 0
    if vae is not None and count:
        first = Spoilt(
            *(part[:count] for part in (spoilt.image, spoilt.shares, spoilt.state, spoilt.melt, spoilt.kind))
        )
        image = torch.cat((round_trip(vae, first, 0.2, generator), image[count:]))
    # What was to be melted among the latents and never went there is still whole.
    whole = spoilt.melt.amax((1, 2, 3)) > 0
    whole[:count] = False
    state, shares = _mended(spoilt, whole)
    out = {name: chunk[name].to(device, non_blocking=True) for name in ("ids", "colours", "heads", "box", "letters")}
    out["image"] = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    out["shares"], out["state"] = shares.half(), state
    out["kind"] = torch.where(whole, -1, spoilt.kind)
    out["trip"] = torch.arange(len(x), device=device) < count
    return out


def _mended(spoilt: Spoilt, whole: Tensor) -> tuple[Tensor, Tensor]:
    """States and shares with the spoilt thing of ``whole`` pictures [B] taken for clear again."""
    at = (spoilt.state == UNCLEAR) & whole[:, None]
    state = torch.where(at, CLEAR, spoilt.state)
    shares = spoilt.shares.clone()
    shares[:, 1 : THINGS + 1] += shares[:, UNCLEAR_AT, None] * at[:, :, None, None]
    shares[:, UNCLEAR_AT] *= ~whole[:, None, None]
    return state, shares


def presence_target(batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, N + 1] floats: whether each concept, and last a sign, is clearly there; and whether that is asked."""
    ids, state = batch["ids"], batch["state"]
    n = len(concepts())
    slot = torch.where(ids < 0, n + 1, ids)  # a last column, cut off again, takes the places without a thing
    target = torch.zeros(len(ids), n + 2, device=ids.device)
    asked = torch.ones_like(target)
    target.scatter_(1, slot, (state == CLEAR).float())
    asked.scatter_(1, slot, (state != ABSENT).float())
    target[:, n] = (batch["letters"][:, 0] > 0).float()
    return target[:, : n + 1], asked[:, : n + 1]


class Ring:
    """Prepared pictures on the device, the oldest overwritten by the newest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tensors: Batch = {}
        self.written = 0

    def put(self, fresh: Batch) -> None:
        count = len(fresh["image"])
        device = fresh["image"].device
        slots = (torch.arange(count, device=device) + self.written).remainder(self.capacity)
        for name, value in fresh.items():
            if name not in self.tensors:
                self.tensors[name] = value.new_zeros(self.capacity, *value.shape[1:])
            self.tensors[name].index_copy_(0, slots, value)
        self.written += count

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` pictures with replacement, [B, 3, H, W] in [-1, 1] under changed light, with their labels."""
        rows = torch.randint(min(self.written, self.capacity), (count,), generator=generator, device=generator.device)
        batch = {name: tensor[rows] for name, tensor in self.tensors.items()}
        batch["image"] = augmented(batch["image"].float() / 127.5 - 1, generator)
        return batch


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other brightness, contrast and tint (too little to change a colour's name), slight blur, slight noise."""
    count, device = len(x), x.device

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator, device=device)

    x = x * uniform(0.92, 1.06) * uniform(0.98, 1.02, 3) + uniform(-0.06, 0.06)
    blur = (uniform(-1.0, 0.8)).clamp_min(0)
    x = x + (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x) * blur
    sharp = uniform(-2.0, 0.5).clamp_min(0)
    x = x + (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) * sharp
    noise = uniform(-0.05, 0.05).clamp_min(0)
    return (x + noise * torch.randn(x.shape, generator=generator, device=device)).clamp(-1, 1)
