"""The doctor: what a LoRA file is, which model it was made for, and what it really does to the velocity."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fluxloom.core.shapes import image_ids, text_ids
from fluxloom.core.specs import MODELS, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.errors import WeightsError
from fluxloom.weights.lora import Change, Linear, Lora, Replacement, Weighted, is_zero, merge
from fluxloom.weights.lora_dialects import DIALECTS
from fluxloom.weights.lora_read import State, arrange, examine, need_finite, read_lora

SEED = 20_240_801
_GRID = (8, 8)  # latent cells of the random input: 16 tokens
_TEXT = 8

# Words in metadata and file names that tell members of one shape apart: the metadata that trainers write names the
# model they started from, in a field of one of these names.
_TOLD_BY = re.compile(r"base_model|sd_model_name|architecture|modelspec\.title|^name$|output_name")
_WORDS = {
    "kontext": "flux1-kontext-dev",
    "krea": "flux1-krea-dev",
    "schnell": "flux1-schnell",
    r"\bfill\b": "flux1-fill-dev",
    "canny": "flux1-canny-dev",
    r"\bdepth\b": "flux1-depth-dev",
    r"flux[-_. ]?1[-_. ]dev": "flux1-dev",
}

Apply = Callable[[Transformer, Sequence[Weighted]], Callable[[], None]]  # returns what takes the LoRAs off again


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    bases    members it may have been made for
    kinds    changes by their algorithm; ``silent`` of them are zero
    ranks    rank: how many changes have it
    scales   alpha / rank, as it was read
    matched  of the keys; the rest are for text encoders (``text``) or ``unmatched``, with reasons
    change   |v' - v| / |v| of the velocity on a seeded random input at strength one; None: not measured
    """

    dialect: str
    title: str
    bases: tuple[str, ...]
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: tuple[float, ...]
    keys: int
    matched: int
    unmatched: tuple[str, ...]
    text: int
    layers: int
    silent: int
    in_channels: int | None
    change: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**facts, "ranks": {str(rank): count for rank, count in self.ranks.items()}}


def diagnose(
    state: State,
    metadata: Mapping[str, str],
    transformer: Transformer | None = None,
    names: Sequence[str] = (),
    apply: Apply = merge,
) -> Report:
    """Examine a LoRA file, for a transformer if there is one at hand, and else for the known shape that fits best.

    ``names`` (a file name) may tell its base. ``apply`` is how it comes to act on the transformer while the change is
    measured; a base that cannot be merged into wants ``infer.adapters``. Raises WeightsError for a LoRA that matches
    nothing, belongs to another base, or has no effect.
    """
    lora = fitting(state, metadata) if transformer is None else _for(state, metadata, transformer.spec, names)
    parts = [part.change for _, part in lora.parts()]
    silent = sum(map(is_zero, parts))
    if silent == len(parts):
        raise WeightsError("got a LoRA without effect: all of its updates are zero, allowed a trained one, try another")
    change = None if transformer is None else relative_change(transformer, lora, apply)
    if change == 0:
        raise WeightsError("got a LoRA that does not change the velocity at all, allowed one that does, try another")
    return Report(
        dialect=lora.dialect,
        title=next((row.title for row in DIALECTS if row.name == lora.dialect), "unknown"),
        bases=bases_of(lora, names),
        kinds=dict(Counter(type(part).__name__ for part in parts)),
        ranks=lora.ranks,
        scales=tuple(sorted({round(part.scale, 6) for part in map(_inner, parts) if isinstance(part, Linear)})),
        keys=lora.keys,
        matched=lora.keys - len(lora.text) - len(lora.unmatched),
        unmatched=lora.unmatched,
        text=len(lora.text),
        layers=len({update.module for update in lora.updates.values()}),
        silent=silent,
        in_channels=lora.in_channels,
        change=change,
        notes=lora.notes,
    )


def fitting(state: State, metadata: Mapping[str, str]) -> Lora:
    """The LoRA of a file for the first of the known shapes that all of it fits, with the fewest notes.

    Where unknown keys are all that is wrong they are listed in the result; raises WeightsError for anything else.
    """
    need_finite(state)
    tried = [arrange(state, metadata, one) for one in _shapes()]
    good = [lora for lora in tried if lora.updates and not lora.misshapen]
    if good:
        return min(good, key=lambda lora: (len(lora.unmatched), len(lora.notes)))
    nearest = max(tried, key=lambda lora: len(lora.updates) + len(lora.misshapen))
    return read_lora(state, metadata, nearest.spec)


def bases_of(lora: Lora, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Members that a LoRA may have been made for: those of its shape, or those that metadata or names tell."""
    if lora.in_channels == 128 and any(isinstance(part.change, Replacement) for _, part in lora.parts()):
        return ("flux1-dev",)  # a control LoRA is added to dev, whose first layer it widens
    fit = [
        name
        for name, model in MODELS.items()
        if model.base is None
        and _same_blocks(model.transformer, lora.spec)
        and lora.in_channels in (None, model.transformer.in_channels)
        and (model.transformer.guidance_embed or not any(name.startswith("guidance_in") for name in lora.updates))
    ]
    told = [value for key, value in lora.metadata.items() if _TOLD_BY.search(key)]
    words = " ".join((*told, *names)).lower()
    return tuple([model for word, model in _WORDS.items() if re.search(word, words) and model in fit] or fit)


@torch.no_grad()
def relative_change(transformer: Transformer, lora: Lora, apply: Apply = merge) -> float:
    """|v' - v| / |v| of the velocity on one seeded random input; the transformer comes back as it was."""
    before = _velocity(transformer)
    undo = apply(transformer, [Weighted(lora)])
    try:
        after = _velocity(transformer)
    finally:
        undo()
    return float((after - before).norm() / before.norm())


def _for(state: State, metadata: Mapping[str, str], spec: TransformerSpec, names: Sequence[str]) -> Lora:
    """A LoRA for one shape. Where it is for another, the error says for which."""
    lora = examine(state, metadata, spec)
    if lora.updates and not lora.misshapen:
        return lora
    other = fitting(state, metadata)  # raises where it is for no known shape
    raise WeightsError(
        f"got a LoRA for another base, of hidden size {other.spec.hidden_size} with {other.spec.depth} double and "
        f"{other.spec.depth_single_blocks} single blocks, allowed {spec.hidden_size}, {spec.depth} and "
        f"{spec.depth_single_blocks}, try it with {' or '.join(bases_of(other, names))}"
    )


def _inner(change: Change) -> Change:
    return getattr(change, "inner", change)


def _velocity(transformer: Transformer) -> Tensor:
    """On random tokens, text and time; channels beyond those of the noise come from the same seed, last."""
    spec = transformer.spec
    bias = transformer.final_layer.linear.bias
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(bias)

    tokens = _GRID[0] * _GRID[1] // 4
    txt, pooled = draw(1, _TEXT, spec.context_in_dim), draw(1, spec.vec_in_dim)
    img = torch.cat((draw(1, tokens, spec.out_channels), draw(1, tokens, spec.in_channels - spec.out_channels)), dim=-1)
    out: Tensor = transformer(
        img,
        image_ids(*_GRID)[None].to(bias.device),
        txt,
        text_ids(_TEXT)[None].to(bias.device),
        torch.tensor([0.6], device=bias.device),
        pooled,
        torch.tensor([3.5], device=bias.device) if spec.guidance_embed else None,
    )
    return out.float()


def _shapes() -> list[TransformerSpec]:
    """The shapes of the known members, each once."""
    return list(dict.fromkeys(model.transformer for model in MODELS.values()))


def _same_blocks(one: TransformerSpec, other: TransformerSpec) -> bool:
    fields = ("hidden_size", "depth", "depth_single_blocks", "context_in_dim", "vec_in_dim")
    return all(getattr(one, name) == getattr(other, name) for name in fields)
