"""One edit of a toy model, stage by stage, against tensors exported once: it needs no oracle, so that any later
change of the code can be checked anywhere. The weights lie in the file too; nothing hangs on a random generator.

The file was made by ``export`` at the bottom, when the parity tests beside this one held the same code against the
official implementation and diffusers, and is not meant to be made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomise, walk
from torch import Tensor

from fluxloom.core import attention, shapes
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.flow import schedule
from fluxloom.core.specs import AutoencoderSpec, TransformerSpec
from fluxloom.core.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden" / "edit.safetensors"
TRANSFORMER = TransformerSpec(
    hidden_size=16, num_heads=2, axes_dim=(2, 2, 4), depth=1, depth_single_blocks=1, context_in_dim=8, vec_in_dim=8
)
VAE = AutoencoderSpec(ch=4, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=2)
WIDTH, HEIGHT = 48, 32
STAGES = ("latent", "velocity", "x", "picture")


def edit(model: Any, vae: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Encode a reference, four shifted steps of Euler with it in context, decode: every stage."""
    h, w = shapes.latent_hw(WIDTH, HEIGHT)
    latent = vae.encode(given["reference"])
    context, x = shapes.pack(latent), shapes.pack(given["noise"])
    ids = torch.cat((shapes.image_ids(h, w), shapes.image_ids(h, w, index=1)))[None]
    velocities = []

    def velocity(x: Tensor, t: float) -> Tensor:
        img, text = torch.cat((x, context), dim=1), shapes.text_ids(given["txt"].shape[1])[None]
        v = model(img, ids, given["txt"], text, torch.tensor([t]), given["pooled"], torch.tensor([2.5]))
        velocities.append(v[:, : x.shape[1]])
        return velocities[-1]

    path = walk(velocity, x, schedule(4, shapes.token_count(WIDTH, HEIGHT)))
    picture = vae.decode(shapes.unpack(path[-1], h, w))
    return {"latent": latent, "velocity": torch.stack(velocities), "x": torch.stack(path), "picture": picture}


def load() -> tuple[Transformer, Autoencoder, dict[str, Tensor]]:
    stored = {key: tensor.float() for key, tensor in load_file(GOLDEN).items()}
    model, vae = Transformer(TRANSFORMER), Autoencoder(VAE)
    state = {f"{k}.{name}": t for k, module in enumerate((model, vae)) for name, t in module.state_dict().items()}
    sizes = [state[name].numel() for name in sorted(state)]
    for name, weights in zip(sorted(state), stored["weights"].split(sizes), strict=True):
        state[name].copy_(weights.view_as(state[name]))
    return model.eval().requires_grad_(False), vae.eval().requires_grad_(False), stored


def close(got: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, bool]:
    """Sums in another order (threads, another processor) move the last digits; mistakes move the first."""
    return {stage: torch.allclose(got[stage], stored[stage], rtol=1e-4, atol=1e-4) for stage in STAGES}


def test_golden() -> None:
    model, vae, stored = load()
    assert close(edit(model, vae, stored), stored) == dict.fromkeys(STAGES, True)


def test_golden_notices_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.rotate
    monkeypatch.setattr(attention, "rotate", lambda x, rope: true(x.flip(-1), rope).flip(-1))
    model, vae, stored = load()
    assert close(edit(model, vae, stored), stored) == {
        "latent": True,
        "velocity": False,
        "x": False,
        "picture": False,
    }


def test_golden_notices_the_autoencoder() -> None:
    model, vae, stored = load()
    vae.decoder.up[2].block, vae.decoder.up[3].block = vae.decoder.up[3].block, vae.decoder.up[2].block
    assert close(edit(model, vae, stored), stored) == {
        "latent": True,
        "velocity": True,
        "x": True,
        "picture": False,
    }


def test_golden_is_small_and_alive() -> None:
    assert GOLDEN.stat().st_size < 140_000
    stored = load_file(GOLDEN)
    assert all(stored[stage].float().std() > 0.05 for stage in STAGES)
    assert all(torch.isfinite(stored[stage]).all() for stage in STAGES)


def export(path: Path) -> None:
    """Weights and inputs are rounded to float16 first, so that the file holds exactly what was run."""
    generator = torch.Generator().manual_seed(11)
    model, vae = randomise(Transformer(TRANSFORMER), 11), randomise(Autoencoder(VAE), 12)
    for module in (model, vae):
        for parameter in module.parameters():
            parameter.data = parameter.half().float()
    assert isinstance(model, Transformer)
    assert isinstance(vae, Autoencoder)
    h, w = shapes.latent_hw(WIDTH, HEIGHT)
    draws = {"noise": (1, 16, h, w), "txt": (1, 5, 8), "pooled": (1, 8)}
    given = {name: torch.randn(shape, generator=generator).half().float() for name, shape in draws.items()}
    given["reference"] = (2 * torch.rand(1, 3, HEIGHT, WIDTH, generator=generator) - 1).half().float()
    state = {f"{k}.{name}": t for k, module in enumerate((model, vae)) for name, t in module.state_dict().items()}
    given["weights"] = torch.cat([state[name].flatten() for name in sorted(state)])  # without 200 names: 25 kB less
    save_file({key: t.half() for key, t in given.items()} | edit(model, vae, given), path)
