"""The two implementations that we are measured against, loaded with our weights: the official one and diffusers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import LATENT, REFERENCE, TEXT_TOKENS, Journey
from torch import Tensor, nn

from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.specs import AutoencoderSpec, TransformerSpec
from fluxloom.core.transformer import Transformer
from fluxloom.weights.dialects import to_diffusers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _official_surroundings() -> Iterator[None]:
    """The official package makes folders where it is imported, and imports a watermark library that its command
    line alone uses; where that is not installed, a mock stands in for it, during the import."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("imwatermark") is None:
            patch.setitem(sys.modules, "imwatermark", MagicMock())
        yield


with _quiet():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    with _official_surroundings():
        from fluxbfl import sampling
        from fluxbfl.model import Flux, FluxParams
        from fluxbfl.modules.autoencoder import AutoEncoder, AutoEncoderParams
        from fluxbfl.util import PREFERED_KONTEXT_RESOLUTIONS, configs

KONTEXT_SIZES = {"official": PREFERED_KONTEXT_RESOLUTIONS, "diffusers": PREFERRED_KONTEXT_RESOLUTIONS}

# The official rows of the members, by our names.
OFFICIAL_MEMBERS = {
    "flux1-dev": configs["flux-dev"],
    "flux1-schnell": configs["flux-schnell"],
    "flux1-kontext-dev": configs["flux-dev-kontext"],
    "flux1-fill-dev": configs["flux-dev-fill"],
    "flux1-canny-dev": configs["flux-dev-canny"],
    "flux1-canny-dev-lora": configs["flux-dev-canny-lora"],
    "flux1-depth-dev": configs["flux-dev-depth"],
    "flux1-depth-dev-lora": configs["flux-dev-depth-lora"],
    "flux1-redux-dev": configs["flux-dev-redux"],
}
UNKNOWN_THERE = {"nano", "tiny-1b", "flux1-krea-dev"}  # ours, and one that is younger than the package

# Scheduler configurations of the published FLUX.1 dev and schnell repositories.
SCHEDULERS = {
    "dev": {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "schnell": {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
}


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def official_transformer(ours: Transformer) -> nn.Module:
    twin = Flux(FluxParams(**asdict(ours.spec)))
    twin.load_state_dict(ours.state_dict())  # strict: the names are the same
    return frozen(twin)


def diffusers_config(spec: TransformerSpec) -> dict[str, object]:
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "num_layers": spec.depth,
        "num_single_layers": spec.depth_single_blocks,
        "attention_head_dim": spec.head_dim,
        "num_attention_heads": spec.num_heads,
        "joint_attention_dim": spec.context_in_dim,
        "pooled_projection_dim": spec.vec_in_dim,
        "guidance_embeds": spec.guidance_embed,
        "axes_dims_rope": spec.axes_dim,
    }


def diffusers_transformer(ours: Transformer) -> nn.Module:
    twin = FluxTransformer2DModel(**diffusers_config(ours.spec))
    twin.load_state_dict(to_diffusers(ours.state_dict(), ours.spec))
    return frozen(twin)


def official_velocity(ours: Transformer, inputs: dict[str, Tensor]) -> Tensor:
    renamed = {"timesteps": inputs["t"], "y": inputs["pooled"]}
    rest = {key: value for key, value in inputs.items() if key not in ("t", "pooled")}
    out: Tensor = official_transformer(ours)(**rest, **renamed)
    return out


def diffusers_velocity(ours: Transformer, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = diffusers_transformer(ours)(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["t"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs.get("guidance"),
        return_dict=False,
    )[0]
    return out


VELOCITIES: dict[str, Callable[[Transformer, dict[str, Tensor]], Tensor]] = {
    "official": official_velocity,
    "diffusers": diffusers_velocity,
}


def official_autoencoder(ours: Autoencoder) -> nn.Module:
    spec = ours.spec
    params = AutoEncoderParams(
        resolution=256,
        in_channels=spec.in_channels,
        ch=spec.ch,
        out_ch=spec.out_channels,
        ch_mult=list(spec.ch_mult),
        num_res_blocks=spec.num_res_blocks,
        z_channels=spec.z_channels,
        scale_factor=spec.scale_factor,
        shift_factor=spec.shift_factor,
    )
    twin = AutoEncoder(params)
    twin.load_state_dict(ours.state_dict())
    return frozen(twin)


def diffusers_vae_config(spec: AutoencoderSpec) -> dict[str, object]:
    levels = len(spec.ch_mult)
    return {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(spec.ch * m for m in spec.ch_mult),
        "layers_per_block": spec.num_res_blocks,
        "latent_channels": spec.z_channels,
        "norm_num_groups": spec.norm_groups,
        "scaling_factor": spec.scale_factor,
        "shift_factor": spec.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def diffusers_autoencoder(ours: Autoencoder) -> nn.Module:
    twin = AutoencoderKL(**diffusers_vae_config(ours.spec))
    twin.load_state_dict(to_diffusers(ours.state_dict(), ours.spec))
    return frozen(twin)


def official_coding(ours: Autoencoder, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(normalised latent of x, picture of z)."""
    twin = official_autoencoder(ours)
    return twin.encode(x), twin.decode(z)


def diffusers_coding(ours: Autoencoder, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with the affine map that diffusers leaves to its pipelines (mode, as Kontext takes it)."""
    twin = diffusers_autoencoder(ours)
    scale, shift = twin.config.scaling_factor, twin.config.shift_factor
    return (twin.encode(x).latent_dist.mode() - shift) * scale, twin.decode(z / scale + shift).sample


CODINGS: dict[str, Callable[[Autoencoder, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "official": official_coding,
    "diffusers": diffusers_coding,
}


def diffusers_schedule(steps: int, tokens: int | None) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler set as the pipelines set it: dev with a token count, schnell without."""
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS["schnell" if tokens is None else "dev"])
    mu = None if tokens is None else calculate_shift(tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


def official_journey(ours: Transformer, trip: Journey) -> Tensor:
    tokens = trip.noise.shape[1]
    more = {}
    if trip.reference is not None:
        more = {"img_cond_seq": trip.reference, "img_cond_seq_ids": official_ids(*REFERENCE, index=1)}
    return sampling.denoise(
        official_transformer(ours),
        img=trip.noise,
        img_ids=official_ids(*LATENT),
        txt=trip.txt,
        txt_ids=torch.zeros(1, TEXT_TOKENS, 3),
        vec=trip.pooled,
        timesteps=sampling.get_schedule(trip.steps, tokens, shift=trip.shift),
        guidance=trip.guidance,
        img_cond=trip.channels,
        **more,
    )


def diffusers_journey(ours: Transformer, trip: Journey) -> Tensor:
    """The loop of the pipelines: time reaches the network through the scheduler's 0 to 1000."""
    model = diffusers_transformer(ours)
    tokens = trip.noise.shape[1]
    scheduler = diffusers_schedule(trip.steps, tokens if trip.shift else None)
    ids = diffusers_ids(*LATENT)
    if trip.reference is not None:
        other = diffusers_ids(*REFERENCE)
        other[..., 0] = 1  # as the Kontext pipeline does
        ids = torch.cat((ids, other))
    x = trip.noise
    for t in scheduler.timesteps:
        img = x if trip.channels is None else torch.cat((x, trip.channels), dim=2)
        if trip.reference is not None:
            img = torch.cat((img, trip.reference), dim=1)
        v = model(
            hidden_states=img,
            encoder_hidden_states=trip.txt,
            pooled_projections=trip.pooled,
            timestep=t.expand(1) / 1000,
            img_ids=ids,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            guidance=torch.tensor([trip.guidance]) if trip.spec.guidance_embed else None,
            return_dict=False,
        )[0]
        x = scheduler.step(v[:, :tokens], t, x, return_dict=False)[0]
    return x


JOURNEYS: dict[str, Callable[[Transformer, Journey], Tensor]] = {
    "official": official_journey,
    "diffusers": diffusers_journey,
}


def diffusers_ids(h: int, w: int) -> Tensor:
    ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, torch.device("cpu"), torch.float32)
    return ids


def _encoder(_: list[str]) -> Tensor:
    """The official preparations ask for text states; which, is no matter here."""
    return torch.zeros(1, TEXT_TOKENS, 8)


def official_prepare(z: Tensor) -> dict[str, Tensor]:
    """The official start of a run: packed latent and ids."""
    out: dict[str, Tensor] = sampling.prepare(_encoder, _encoder, z, "a prompt")
    return out


def official_kontext(picture: Image.Image, folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """The official start of an edit (with a VAE that is a mean over cells), and the (height, width) it chose."""

    class Mean:
        def encode(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x[:, :1], 8).repeat(1, 16, 1, 1)

    picture.save(folder / "reference.png")
    return sampling.prepare_kontext(
        _encoder, _encoder, "a prompt", Mean(), str(folder / "reference.png"), seed=0, device=torch.device("cpu")
    )


def official_ids(h: int, w: int, index: int = 0) -> Tensor:
    """The official ids of a target; a reference's are the same at index 1 (official_kontext shows it)."""
    ids = official_prepare(torch.zeros(1, 16, h, w))["img_ids"]
    ids[..., 0] = index
    return ids
