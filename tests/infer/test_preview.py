"""What an observer sees: glances near the picture, without a full decode; and the colours that they are made of."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import randomise
from torch import Tensor

from fluxloom import world
from fluxloom.core.autoencoder import Autoencoder
from fluxloom.core.shapes import pack, unpack
from fluxloom.core.specs import MODELS, TinyDecoderSpec
from fluxloom.core.tiny_decoder import TinyDecoder
from fluxloom.errors import BadInput, Failure
from fluxloom.infer import pictures
from fluxloom.infer.pipeline import Pipeline
from fluxloom.infer.preview import Preview, colours, fit_rgb_map, load_decoder
from fluxloom.infer.request import Request
from fluxloom.weights.load import ASSETS, build, load_folder, part

NANO = MODELS["nano"].autoencoder


@pytest.fixture(scope="module")
def nano() -> Autoencoder:
    return build(lambda: Autoencoder(NANO), part(load_folder(ASSETS / "nano"), "autoencoder"))


@pytest.fixture
def preview(pipeline: Pipeline) -> Preview:
    """Of pico, after its first step."""
    (event,) = islice(pipeline.stream(Request(prompt="a cat", seed=1)), 1)
    assert isinstance(event, Preview)
    return event


def renders(seed: int, count: int, size: int) -> list[Image.Image]:
    rng = random.Random(seed)
    scenes = (world.sample_scene(rng, world.Mix.scenes()) for _ in range(count))
    return [Image.fromarray(world.render(scene, size).pixels) for scene in scenes]


def difference(a: Image.Image, b: Image.Image) -> float:
    """Root mean square, in levels of 255."""
    return float(np.sqrt(np.square(np.asarray(a, float) - np.asarray(b, float)).mean()))


# ---------------------------------------------------------------------------------------------- glances


def test_a_glance_decodes_nothing(pipeline: Pipeline) -> None:
    decoded: list[Any] = []
    hook = pipeline.runtime.autoencoder.decoder.register_forward_hook(lambda *args: decoded.append(args))
    glances = []
    pipeline.run(Request(prompt="a cat", seed=3), observe=lambda event: glances.append(event.quick))
    hook.remove()
    assert len(decoded) == 1  # the picture
    assert [glance.size for glance in glances] == [(32, 24)] * 3  # half of 64 x 48
    assert all(glance.mode == "RGB" for glance in glances)


def test_a_glance_is_made_once(preview: Preview) -> None:
    assert preview.quick is preview.quick


def test_a_glance_is_near_the_picture(preview: Preview, nano: Autoencoder) -> None:
    """Of nano: 16 to 23 levels of 255 from the decoded picture at half the size; its mean colour is 42 to 63 off."""
    (picture,) = renders(5, 1, 256)
    z = nano.encode(pictures.to_tensor(picture))
    runtime = replace(preview.runtime, spec=MODELS["nano"], autoencoder=nano)
    seen = replace(preview, step=replace(preview.step, x0=pack(z)), hw=(32, 32), runtime=runtime)
    whole = seen.image.resize(seen.quick.size, Image.Resampling.BOX)
    assert seen.quick.size == (128, 128)
    assert difference(seen.quick, whole) < 25
    flat = Image.new("RGB", whole.size, tuple(np.asarray(whole).mean((0, 1)).astype(int)))
    assert difference(seen.quick, whole) < difference(flat, whole) / 2


def test_a_decoder_makes_it_at_full_size(preview: Preview) -> None:
    decoder = randomise(TinyDecoder(TinyDecoderSpec(width=8)), 0)
    assert isinstance(decoder, TinyDecoder)
    seen = replace(preview, decoder=decoder)
    assert seen.quick.size == seen.image.size
    expected = pictures.to_picture(decoder(unpack(preview.step.x0, *preview.hw)))
    assert difference(seen.quick, expected) == 0


def test_a_decoder_computes_in_its_own_dtype(preview: Preview) -> None:
    decoder = randomise(TinyDecoder(TinyDecoderSpec(width=8)), 0).bfloat16()
    assert isinstance(decoder, TinyDecoder)
    whole = randomise(TinyDecoder(TinyDecoderSpec(width=8)), 0)
    assert isinstance(whole, TinyDecoder)
    assert difference(replace(preview, decoder=decoder).quick, replace(preview, decoder=whole).quick) < 10


def test_a_decoder_is_loaded_for_latents_of_flux1_only(tmp_path: Path) -> None:
    weights = TinyDecoder(TinyDecoderSpec()).state_dict()
    save_file({f"decoder.{name}": tensor for name, tensor in weights.items()}, tmp_path / "x.safetensors")
    decoder = load_decoder(tmp_path / "x.safetensors", MODELS["flux1-schnell"])
    torch.testing.assert_close(decoder.layers[0].weight, weights["layers.0.weight"])
    with pytest.raises(BadInput, match="previews of nano"):
        load_decoder(tmp_path / "x.safetensors", MODELS["nano"])


def test_without_colours_it_is_the_picture(preview: Preview) -> None:
    spec = preview.runtime.spec
    bare = replace(spec, autoencoder=replace(spec.autoencoder, rgb_map=()))
    seen = replace(preview, runtime=replace(preview.runtime, spec=bare))
    assert seen.quick is seen.image


def test_numbers_that_are_not_finite_are_a_failure(preview: Preview) -> None:
    broken = replace(preview, step=replace(preview.step, x0=preview.step.x0 * torch.nan))
    with pytest.raises(Failure, match="not finite"):
        broken.quick  # noqa: B018


# ---------------------------------------------------------------------------------------------- colours


def test_every_member_has_a_row_for_each_channel_and_a_last_one() -> None:
    for spec in MODELS.values():
        assert np.shape(spec.autoencoder.rgb_map) == (spec.autoencoder.z_channels + 1, 3)
    assert NANO.rgb_map != MODELS["flux1-dev"].autoencoder.rgb_map


def test_colours_are_a_sum_of_rows() -> None:
    rgb_map = ((0.5, 0.0, 0.1), (0.0, -0.25, 0.2), (0.1, 0.2, 0.3))
    z = torch.zeros(1, 2, 2, 3)
    z[0, :, 1, 2] = torch.tensor([1.0, 2.0])
    out = colours(z, rgb_map)
    assert out.shape == (1, 3, 2, 3)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(out[0, :, 1, 2], torch.tensor([0.6, -0.3, 0.8]))


def test_a_fit_finds_the_map_that_made_the_pictures() -> None:
    rgb_map = ((0.5, 0.0, 0.1), (0.0, -0.25, 0.2), (0.1, 0.2, 0.3))
    z = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    x = colours(z, rgb_map).repeat_interleave(8, -1).repeat_interleave(8, -2)
    assert np.allclose(fit_rgb_map(z, x), rgb_map, atol=1e-4)


def test_nano_refitted(nano: Autoencoder) -> None:
    """24 renders at half the size give colours like those of the 256 that the row was fitted on: 0.04 apart."""
    x = torch.cat([pictures.to_tensor(picture) for picture in renders(11, 24, 128)])
    with torch.inference_mode():
        z = torch.cat([nano.encode(some) for some in x.split(8)])
    means: Tensor = torch.nn.functional.avg_pool2d(x, 8)
    ours, again = (colours(z, rgb_map) for rgb_map in (NANO.rgb_map, fit_rgb_map(z, x)))
    assert float((ours - again).square().mean().sqrt()) < 0.06
    assert float((ours - means).square().mean() / means.var()) < 0.08  # unexplained
