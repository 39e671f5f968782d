"""Chunks of training samples, rendered by worker processes, and the pool of latents they are drawn from again.

A chunk is a pure function of (stage, seed, rank, index), so any run can be resumed exactly by its step number.
Legend: n samples, K texts a sample, S side in pixels, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fluxloom import world
from fluxloom.core.shapes import TOKEN
from fluxloom.core.text import Tokenizer
from fluxloom.world.words import Language

Chunk = dict[str, Tensor]
TEXTS = 2  # texts drawn for each sample: a latent is used several times, each time with one of them


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What is rendered: a mix of the world at one size, ``draws`` pictures and ``edits`` pairs a chunk."""

    mix: world.Mix
    size: int
    draws: int
    edits: int
    chinese: float = 0.4
    item_weight: float = 3.0
    sign_weight: float = 5.0
    change_weight: float = 3.0


class Chunks(Dataset[Chunk]):
    """Chunk ``index`` of a rank, rendered on demand."""

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer, seed: int, rank: int, first: int, count: int) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.seed, self.rank, self.first, self.count = seed, rank, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Chunk:
        rng = random.Random(f"{self.seed}/{self.rank}/{self.spec.size}/{self.first + i}")
        return {**self._draws(rng), **self._edits(rng)}

    def _draws(self, rng: random.Random) -> Chunk:
        spec = self.spec
        images, weights, ids = [], [], []
        for _ in range(spec.draws):
            scene = world.sample_scene(rng, spec.mix)
            picture = world.render(scene, spec.size)
            images.append(picture.pixels)
            weights.append(self._item_weights(picture.items))
            ids.append(self._texts(rng, partial(world.caption, scene, rng)))
        return _stack("draw", {"image": images, "weight": weights, "ids": ids})

    def _edits(self, rng: random.Random) -> Chunk:
        spec = self.spec
        sources, targets, weights, ids = [], [], [], []
        for _ in range(spec.edits):
            edit = world.sample_edit(rng, spec.mix)
            pair = world.render_edit(edit, spec.size)
            sources.append(pair.source.pixels)
            targets.append(pair.target.pixels)
            changed = np.where(token_any(pair.change), spec.change_weight, 1.0).astype(np.float16)
            # An edit that redraws most of the picture says nothing by its mask: there things count, as in a drawing.
            weights.append(changed if pair.change.mean() < 0.6 else self._item_weights(pair.target.items))
            ids.append(self._texts(rng, partial(edit.instruction, rng)))
        return _stack("edit", {"source": sources, "image": targets, "weight": weights, "ids": ids})

    def _item_weights(self, items: np.ndarray) -> np.ndarray:
        """Objects are a sixth of the tokens but all of the difficulty; letters more so."""
        weights = np.where(token_any(items > 0), self.spec.item_weight, 1.0)
        return np.where(token_any(items == 255), self.spec.sign_weight, weights).astype(np.float16)

    def _texts(self, rng: random.Random, write: Callable[[Language], str]) -> np.ndarray:
        languages: list[Language] = ["zh" if rng.random() < self.spec.chinese else "en" for _ in range(TEXTS)]
        return np.array([self.tokenizer.encode(write(language)) for language in languages], dtype=np.int16)


def token_any(mask_HW: np.ndarray) -> np.ndarray:
    """[L] bool: whether the mask touches each token's square of pixels."""
    h, w = (side // TOKEN for side in mask_HW.shape)
    return mask_HW.reshape(h, TOKEN, w, TOKEN).any(axis=(1, 3)).reshape(-1)


def _stack(prefix: str, parts: dict[str, list[np.ndarray]]) -> Chunk:
    return {f"{prefix}.{name}": torch.from_numpy(np.stack(arrays)) for name, arrays in parts.items() if arrays}


def load_chunks(chunks: Dataset[Chunk], mix: world.Mix, workers: int, ahead: int = 3) -> Iterator[Chunk]:
    """Chunks of a mix in order, ``ahead`` of them rendered before they are asked for by each of ``workers`` processes
    (0: here)."""
    if workers:
        warm_atlas(mix)
    loader: DataLoader[Chunk] = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def warm_atlas(mix: world.Mix) -> None:
    """Decode every sprite of the mix once, before worker processes fork and share them."""
    atlas = world.load_atlas()
    for style, _ in mix.styles:
        for key in atlas.concepts:
            atlas.sprite(key, style, None, 0)  # spelled as the renderer does: the cache looks at the arguments


def _one_thread(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def to_unit(pixels_BHWC: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1] on the device."""
    return pixels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


class Pool:
    """A ring of encoded samples on the device. Rendering and encoding are dearer than one use, so each sample is drawn
    about ``capacity / rate`` times, with fresh noise, time and text."""

    def __init__(self, capacity: int, encode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.capacity, self.encode, self.device = capacity, encode, device
        self.tensors: dict[str, Tensor] = {}
        self.written = {"draw": 0, "edit": 0}

    def put(self, chunk: Chunk) -> None:
        """Encode the pictures of a chunk and write it over the oldest samples."""
        for kind in self.written:
            fresh = {name: value for name, value in chunk.items() if name.startswith(kind)}
            if not fresh:
                continue
            count = len(fresh[f"{kind}.image"])
            slots = (torch.arange(count, device=self.device) + self.written[kind]).remainder(self.capacity)
            for name, value in fresh.items():
                on_device = (
                    self.encode(to_unit(value, self.device)) if value.dtype == torch.uint8 else value.to(self.device)
                )
                if name not in self.tensors:
                    self.tensors[name] = on_device.new_zeros(self.capacity, *on_device.shape[1:])
                self.tensors[name].index_copy_(0, slots, on_device)
            self.written[kind] += count

    def draw(self, kind: str, count: int, generator: torch.Generator) -> Chunk:
        """``count`` samples, with replacement, one of their texts each."""
        filled = min(self.written[kind], self.capacity)
        rows = torch.randint(filled, (count,), generator=generator, device=self.device)
        text = torch.randint(TEXTS, (count,), generator=generator, device=self.device)
        batch = {name.removeprefix(f"{kind}."): t[rows] for name, t in self.tensors.items() if name.startswith(kind)}
        batch["ids"] = batch["ids"][torch.arange(count, device=self.device), text].long()
        return batch
