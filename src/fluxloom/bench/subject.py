"""What is measured: a model with random or real weights, the inputs of one step, and its answer in float32.

Speed does not depend on the numbers in weights (as long as they are neither zero nor infinite), so that any row of
MODELS can be measured at full size without its files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxloom.core import shapes
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.clip import ClipText
from fluxloom.core.specs import MODELS, ModelSpec, Size
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.text import TextStates
from fluxloom.core.transformer import Transformer
from fluxloom.errors import BadInput, UnknownModel
from fluxloom.infer.executor import Given, Plain
from fluxloom.infer.reading import Reader, pair_reader
from fluxloom.infer.runtime import Runtime
from fluxloom.weights.load import Uninitialised
from fluxloom.weights.vocabularies import load_vocabulary

Module = TypeVar("Module", bound=nn.Module)
# bfloat16 holds these exactly, a thousandfold too: diffusers rounds time and guidance to the model's dtype before it
# embeds them, and with other values would answer another question.
TIME, GUIDANCE = 0.5, 4.0
SEED = 7


# ---------------------------------------------------------------------------------------------------------- weights


def randomise(module: Module, seed: int = 0) -> Module:
    """Normal numbers of variance 1 / inputs, so that states keep their size through any depth, and nothing that is 0 or
    1 exactly. T5's attention has no scale: its queries bring it along, as they do when it is trained."""
    first = next(module.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    heads = module.spec.head_dim if isinstance(module, T5Encoder) else 1
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim < 2:
                bias = name.endswith("bias")
                weight.normal_(0, 0.02 if bias else 0.05, generator=generator).add_(0 if bias else 1)
            elif "embedding" in name or "shared" in name or "attention_bias" in name:
                weight.normal_(0, 0.1, generator=generator)
            else:
                spread = weight[0].numel() ** -0.5
                weight.normal_(0, spread * (heads**-0.5 if ".q." in name else 1), generator=generator)
    return module.eval().requires_grad_(False)


def random_module(make: Callable[[], Module], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Module:
    """A module with random weights, made where it will compute: 12 B take seconds on a GPU."""
    with Uninitialised(), torch.device("meta"):
        module = make()
    return randomise(module.to(dtype).to_empty(device=device), seed)


def sharing(module: Module) -> Module:
    """A module of its own over the same numbers: what is exchanged or converted in one stays as it is in the other."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


@dataclass
class Noise:
    """A reader that answers every prompt with the same random states, of the shapes of a member: for steps, whose
    speed no word changes."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def read(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
        row, generator = self.spec.transformer, torch.Generator().manual_seed(SEED)
        tokens = torch.randn(1, text_length or self.spec.text_length, row.context_in_dim, generator=generator)
        pooled = torch.randn(1, row.vec_in_dim, generator=generator)
        return TextStates(tokens.to(self.device, self.dtype), pooled.to(self.device, self.dtype))

    def notes(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> list[str]:
        return []

    def translation(self, prompt: str) -> str | None:
        return None

    def recall(self, prompt: str, translation: str) -> None:
        raise BadInput("got a translation for a model without words, allowed none, try a loaded model")


def known(model: str) -> ModelSpec:
    """The row of a name. Raises UnknownModel."""
    if model not in MODELS:
        raise UnknownModel(f"got model {model!r}, allowed {', '.join(MODELS)}, try flux1-dev")
    return MODELS[model]


def is_random(model: str) -> bool:
    """Whether a reference is measured with random weights: the name of a member that does not come with the package."""
    return model in MODELS and not MODELS[model].embedded


def runtime(model: str, device: torch.device, dtype: torch.dtype, *, words: bool = False) -> Runtime:
    """A model to measure: with random weights, by the name of a member; loaded, where the reference names files or the
    embedded model. ``words``: with the text encoders, which a single step has no need of.

    Raises what :func:`fluxloom.load` raises for files.
    """
    if not is_random(model):
        from fluxloom.api import load

        return load(model, str(device), str(dtype).removeprefix("torch.")).pipeline.runtime
    return random_runtime(known(model), device, dtype, words=words)


def random_runtime(spec: ModelSpec, device: torch.device, dtype: torch.dtype, *, words: bool = False) -> Runtime:
    """A member with random weights of its real classes; its text tower, if it has one of its own, answers noise."""
    reader: Reader = Noise(spec, device, dtype)
    if words and spec.text is None:
        clip = random_module(lambda: ClipText(spec.pair.clip), device, dtype, 2)
        t5 = random_module(lambda: T5Encoder(spec.pair.t5), device, dtype, 3)
        reader = pair_reader(spec, clip, t5, (load_vocabulary("clip"), load_vocabulary("t5")))
    return Runtime(
        spec=spec,
        transformer=random_module(lambda: Transformer(spec.transformer), device, dtype, 0),
        autoencoder=random_module(lambda: Autoencoder(spec.autoencoder), device, torch.float32, 1),
        reader=reader,
        content="random weights",
        device=device,
        dtype=dtype,
    )


def reshaped(found: Runtime, dtype: torch.dtype) -> Runtime:
    """The same model, to be rewritten and converted without the other being touched: it shares what stays."""
    return Runtime(
        spec=found.spec,
        transformer=sharing(found.transformer),
        autoencoder=found.autoencoder,
        reader=found.reader,
        content=found.content,
        device=found.device,
        dtype=dtype,
    )


# ----------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, eq=False)
class Step:
    """The inputs of one denoise step, float32 on the device; see :class:`fluxloom.infer.executor.Given`."""

    img: Tensor
    t: tuple[float, ...]
    given: Given

    @classmethod
    def of(cls, spec: ModelSpec, size: Size, references: Sequence[Size], batch: int, device: torch.device) -> Step:
        """Random tokens of a picture of ``size`` and of references, each on its own plane of positions."""
        row, generator = spec.transformer, torch.Generator().manual_seed(SEED)
        sizes = [size, *references]
        ids = torch.cat([shapes.image_ids(*shapes.latent_hw(*one), index=k) for k, one in enumerate(sizes)])
        states = Noise(spec, device, torch.float32).read("")
        given = Given(
            txt=states.tokens.expand(batch, -1, -1),
            txt_ids=shapes.text_ids(spec.text_length).to(device).expand(batch, -1, -1),
            img_ids=ids.to(device).expand(batch, -1, -1),
            pooled=states.pooled.expand(batch, -1),
            guidance=(GUIDANCE,) * batch if row.guidance_embed else None,
            targets=shapes.token_count(*size),
            times=(TIME,),
        )
        img = torch.randn(batch, len(ids), row.in_channels, generator=generator).to(device)
        return cls(img, (TIME,) * batch, given)

    def to(self, dtype: torch.dtype) -> Step:
        """The same numbers as a model of this dtype takes them."""
        given = self.given
        txt, pooled = (x.bfloat16().to(dtype) for x in (given.txt, given.pooled))  # the same numbers in any dtype
        facts = {name: getattr(given, name) for name in ("txt_ids", "img_ids", "guidance", "targets", "times")}
        return Step(self.img.bfloat16().to(dtype), self.t, Given(txt=txt, pooled=pooled, **facts))

    @property
    def tokens(self) -> tuple[int, int]:
        """Of text and of pictures."""
        return self.given.txt.shape[1], self.img.shape[1]


# -------------------------------------------------------------------------------------------------------- the truth


@torch.inference_mode()
def wide(transformer: Transformer, step: Step) -> Tensor:
    """The velocity of the target's tokens in float32 throughout, from weights as they are. Blocks become float32 one by
    one, so that it takes little more memory than there is in use."""
    model = sharing(transformer)
    for name, child in model.named_children():
        if not name.endswith("_blocks"):
            child.float()
    for block in (*model.double_blocks, *model.single_blocks):
        block.register_forward_pre_hook(lambda module, _: (module.float(), None)[1])
        block.register_forward_hook(lambda module, *_: (module.to("meta"), None)[1])
    inputs = step.to(torch.float32)
    return Plain(model)(inputs.img, inputs.t, inputs.given)[:, : inputs.given.targets]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative error over all numbers, ||found - truth|| / ||truth||, in float64; of the target's tokens."""
    found = found[:, : truth.shape[1]].to(truth.device)
    return float((found.double() - truth.double()).norm() / truth.double().norm())


# -------------------------------------------------------------------------------------------------------- arguments


def own_sizes(spec: ModelSpec, size: Size | None, references: int, reference: Size | None) -> tuple[Size, list[Size]]:
    """The size to draw, and those of references: unless given, the model's own, and 1024x1024 (or, of models that see
    references at the size to draw, that)."""
    row = next(iter(spec.tasks.values()))
    own = size or row.size
    for side in (*own, *(reference or ())):
        if side < shapes.TOKEN or side % shapes.TOKEN:
            raise BadInput(f"got a side of {side} px, allowed multiples of {shapes.TOKEN}, try 1024")
    seen = reference or (shapes.nearest_size(1, 1, spec.preferred_sizes) if spec.preferred_sizes else own)
    return own, [seen] * references


def folder_files(path: Path) -> list[Path]:
    """Every file under a path, or the path itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
