"""The pipelines of diffusers and the official preparations, built from tiny random components of the same classes, and
our own way from a request to the last latent with the same weights, noise and text states."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    SCHEDULERS,
    _official_surroundings,
    _quiet,
    diffusers_autoencoder,
    diffusers_transformer,
    official_autoencoder,
    official_transformer,
)
from PIL import Image
from tiny import TEXT_TOKENS, VAE, autoencoder, randomise, shrink, transformer
from torch import Tensor

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.redux import Redux, ReduxSpec
from fluxloom.core.solvers import SOLVERS
from fluxloom.core.specs import MODELS, ModelSpec
from fluxloom.core.text import TextStates
from fluxloom.core.transformer import Transformer
from fluxloom.infer import conditions, sample
from fluxloom.infer.executor import Plain
from fluxloom.infer.loras import Rack
from fluxloom.infer.request import Request, resolve
from fluxloom.infer.runtime import Runtime

with _quiet():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FluxControlPipeline,
        FluxFillPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
        FluxKontextPipeline,
        FluxPipeline,
        FluxPriorReduxPipeline,
    )
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext_pipeline
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder as DiffusersRedux
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    with _official_surroundings():
        from fluxbfl import sampling
        from fluxbfl.modules import image_embedders

SEED, STEPS = 5, 4
WIDTH, HEIGHT = 96, 64  # 24 tokens; multiples of 32, for Fill
SIZES = ((64, 96), (80, 80), (96, 64))  # preferred sizes of a toy Kontext
KONTEXT = kontext_pipeline  # where its preferred sizes are
PIPELINES = {
    "text": FluxPipeline,
    "image": FluxImg2ImgPipeline,
    "kontext": FluxKontextPipeline,
    "fill": FluxFillPipeline,
    "control": FluxControlPipeline,
    "inpaint": FluxInpaintPipeline,
}


def toy(name: str) -> ModelSpec:
    """A member at toy width and toy size."""
    spec = MODELS[name]
    tasks = {task: replace(row, steps=STEPS, size=(WIDTH, HEIGHT)) for task, row in spec.tasks.items()}
    small = {"transformer": shrink(spec.transformer), "autoencoder": VAE, "tasks": tasks, "min_side": 32}
    return replace(spec, **small, preferred_sizes=SIZES if spec.preferred_sizes else ())


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """A smooth colourful picture with noise on it."""
    generator = np.random.default_rng(seed)
    rough = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(rough).astype(int) + generator.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def mask(kind: str = "ragged") -> Image.Image:
    """White where it is repainted: ``aligned`` to latent cells, ``ragged``, or ``soft``, in all greys."""
    values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    if kind == "aligned":
        values[16:48, 24:72] = 255
    else:
        values[13:50, 21:61] = 255
        values[30:, 50:70:3] = 255
    if kind == "soft":
        values[:, 72:] = np.linspace(0, 255, WIDTH - 72).round()
    return Image.fromarray(values)


def read(prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
    """Text states of a prompt: no tower, only numbers that differ from prompt to prompt."""

    def draw(text: str, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))

    return TextStates(draw(prompt if prompt_t5 is None else prompt_t5, TEXT_TOKENS, 24), draw(prompt, 20))


@dataclass
class Scene:
    """One toy member with its weights, run by us and by others."""

    spec: ModelSpec
    model: Transformer
    vae: Autoencoder
    redux: Redux | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, **asked: Any) -> Scene:
        spec = toy(name)
        return cls(spec, transformer(spec.transformer, 5), autoencoder(VAE, 6), asked=asked)

    def runtime(self) -> Runtime:
        """A runtime without text towers."""
        runtime = Runtime.__new__(Runtime)
        runtime.spec, runtime.transformer, runtime.autoencoder = self.spec, self.model, self.vae
        runtime.device, runtime.dtype, runtime.redux = torch.device("cpu"), torch.float32, self.redux
        runtime.loras, runtime.executor, runtime._lately = Rack(self.model, self.spec), Plain(self.model), {}
        return runtime

    def conditions(self, **more: Any) -> conditions.Conditioning:
        """Of the scene's request."""
        request = resolve(Request(**{"prompt": "a cat", "seed": SEED, **self.asked, **more}), self.spec)
        runtime = self.runtime()
        return conditions.condition(request, self.spec, read, runtime.encode, runtime.see)

    def ours(self, **more: Any) -> Tensor:
        """The last latent, packed [1, L, 64], as a pipeline comes to it."""
        request = resolve(Request(**{"prompt": "a cat", "seed": SEED, **self.asked, **more}), self.spec)
        made = self.conditions(**more)
        solver = SOLVERS[request.solver].run
        run = sample.trajectory(made.start(0), solver, made.times, made.rows, request.true_cfg, made.known(0))
        return sample.drive(run, self.runtime().velocity)

    def diffusers(self, kind: str, *, means: bool = True, **arguments: Any) -> Tensor:
        """What the pipeline of that kind comes to, on the same noise and text states."""
        with _quiet(), torch.no_grad(), _means() if means else nullcontext():
            pipe = PIPELINES[kind](
                scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS["dev" if self.spec.shift else "schnell"]),
                vae=diffusers_autoencoder(self.vae),
                transformer=diffusers_transformer(self.model),
                **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
            )
            pipe.set_progress_bar_config(disable=True)
            text = read("a cat")
            given = {
                "prompt_embeds": text.tokens,
                "pooled_prompt_embeds": text.pooled,
                "width": WIDTH,
                "height": HEIGHT,
                "num_inference_steps": STEPS,
                "guidance_scale": next(iter(self.spec.tasks.values())).guidance or 0.0,
                "generator": torch.Generator().manual_seed(SEED),
                "output_type": "latent",
            }
            out: Tensor = pipe(**{**given, **arguments}).images
        return out


@contextmanager
def _means() -> Iterator[None]:
    """diffusers draws from what its encoder gives, for Fill, Control, image to image and inpainting; the official code
    takes the mean since June 2025. Here both take the mean."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        yield


class _Float32:
    """torch, but what the official preparations round to bfloat16 stays in float32: only the rounding is undone."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def official() -> Iterator[None]:
    """The official preparations, in float32."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(sampling, "torch", _Float32())
        yield


def official_encoder(scene: Scene) -> Any:
    """The official autoencoder with the scene's weights."""
    return official_autoencoder(scene.vae)


def official_journey(scene: Scene, prepared: dict[str, Tensor], **more: Any) -> Tensor:
    """The official loop from our start state, with what the official preparations made."""
    made = scene.conditions()
    keys = ("img_cond", "img_cond_seq", "img_cond_seq_ids")
    row = next(iter(scene.spec.tasks.values()))
    tokens = made.start(0).shape[1]
    given = {
        "img": made.start(0),
        **{name: prepared[name] for name in ("img_ids", "txt", "txt_ids", "vec")},
        **{name: prepared[name] for name in keys if name in prepared},
        "timesteps": sampling.get_schedule(STEPS, tokens, shift=scene.spec.shift),
        "guidance": row.guidance,
    }
    with torch.no_grad():
        out: Tensor = sampling.denoise(official_transformer(scene.model), **{**given, **more})
    return out


REDUX = ReduxSpec(width=16, layers=2, heads=2, mlp=24, patch=14, side=48, out_dim=24)  # 3 x 3 patches, 6 pixels over


def redux() -> tuple[Redux, Any, Any]:
    """Ours at toy width, and its two halves in others' classes: the vision tower, and what makes its pictures."""
    ours = Redux(REDUX)
    randomise(ours, 8)
    config = SiglipVisionConfig(
        hidden_size=REDUX.width,
        intermediate_size=REDUX.mlp,
        num_hidden_layers=REDUX.layers,
        num_attention_heads=REDUX.heads,
        image_size=REDUX.side,
        patch_size=REDUX.patch,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(config).eval()
    tower.load_state_dict(ours.vision_model.state_dict())  # strict: the names are the same
    side = {"height": REDUX.side, "width": REDUX.side}
    return ours, tower, SiglipImageProcessorPil(size=side)


def adapter(ours: Redux) -> dict[str, Tensor]:
    """The weights of the adapter alone."""
    return {name: value for name, value in ours.state_dict().items() if name.startswith("redux_")}


def diffusers_prior(
    ours: Redux, tower: Any, processor: Any, seen: Image.Image, weight: float = 1.0
) -> dict[str, Tensor]:
    """What the prior pipeline of diffusers makes of a picture: arguments for the pipeline after it."""
    embedder = DiffusersRedux(redux_dim=REDUX.width, txt_in_features=REDUX.out_dim)
    embedder.load_state_dict(adapter(ours))
    text = read("a cat")
    with _quiet(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        prior = FluxPriorReduxPipeline(image_encoder=tower, feature_extractor=processor, image_embedder=embedder)
        prior.text_encoder = object()  # only asked whether it is there
        states = (text.tokens.clone(), text.pooled.clone(), None)
        patch.setattr(prior, "encode_prompt", lambda **_: states)
        found = prior(seen, prompt_embeds_scale=weight)
    return {"prompt_embeds": found.prompt_embeds, "pooled_prompt_embeds": found.pooled_prompt_embeds}


def official_redux(ours: Redux, tower: Any, processor: Any) -> Any:
    """The official encoder of pictures, without the download in its constructor."""
    made = image_embedders.ReduxImageEncoder.__new__(image_embedders.ReduxImageEncoder)
    torch.nn.Module.__init__(made)
    made.device, made.dtype = torch.device("cpu"), torch.float32
    made.redux_up, made.redux_down = ours.redux_up, ours.redux_down
    made.siglip, made.normalize = tower, processor
    return made


def t5(_: list[str]) -> Tensor:
    """The official preparations ask for text states."""
    return read("a cat").tokens


def clip(_: list[str]) -> Tensor:
    return read("a cat").pooled
