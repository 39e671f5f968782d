"""What a checkpoint is: published key tables of every dialect, members of one shape told apart, and other models."""

from __future__ import annotations

import contextlib
import json
import re
from math import prod
from pathlib import Path

import keytables
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keytables import ALL_IN_ONE, Table, checkpoint, gguf_mix, nf4, scaled_fp8, stored
from safetensors.torch import save_file
from tiny import DEV, VAE, autoencoder, transformer

from fluxloom.core.specs import MODELS, AutoencoderSpec, ClipSpec, T5Spec, TransformerSpec
from fluxloom.errors import BadInput, WeightsError
from fluxloom.weights.checkpoint import Checkpoint, open_checkpoint
from fluxloom.weights.dialects import to_diffusers
from fluxloom.weights.identify import Component, choose, identify
from fluxloom.weights.load import ASSETS
from fluxloom.weights.stream import need_fit

DEVS = ("flux1-dev", "flux1-krea-dev", "flux1-kontext-dev")
CONTROLS = ("flux1-canny-dev", "flux1-depth-dev")
# file: (key table, dialect, prefix, members of its shape, its storage formats)
FILES: dict[str, tuple[Table, str, str, tuple[str, ...], set[str]]] = {
    "flux1-dev": (stored(keytables.official()), "official", "", DEVS, {"bfloat16"}),
    "flux1-schnell": (stored(keytables.official(64, False)), "official", "", ("flux1-schnell",), {"bfloat16"}),
    "flux1-fill-dev": (stored(keytables.official(384)), "official", "", ("flux1-fill-dev",), {"bfloat16"}),
    "flux1-canny-dev": (stored(keytables.official(128)), "official", "", CONTROLS, {"bfloat16"}),
    "diffusers dev": (stored(keytables.diffusers()), "diffusers", "", DEVS, {"bfloat16"}),
    "diffusers schnell": (stored(keytables.diffusers(64, False)), "diffusers", "", ("flux1-schnell",), {"bfloat16"}),
    "fp8": (stored(keytables.official(), "F8_E4M3"), "official", "", DEVS, {"fp8_e4m3"}),
    "fp8 scaled": (scaled_fp8(keytables.official()), "official", "", DEVS, {"fp8_scaled", "bfloat16"}),
    "fp8 scaled, prefixed": (
        scaled_fp8(keytables.official(384), ALL_IN_ONE), "official", ALL_IN_ONE, ("flux1-fill-dev",),
        {"fp8_scaled", "bfloat16"},
    ),
    "GGUF": (gguf_mix(keytables.official()), "official", "", DEVS, {"Q4_K", "Q5_K", "float32"}),
    "GGUF Q8_0": (gguf_mix(keytables.official(), "Q8_0", "Q8_0"), "official", "", DEVS, {"Q8_0", "float32"}),
    "NF4": (nf4(keytables.official(), ALL_IN_ONE), "official", ALL_IN_ONE, DEVS, {"nf4", "bfloat16"}),
    "diffusers NF4": (nf4(keytables.diffusers()), "diffusers", "", DEVS, {"nf4", "bfloat16"}),
}  # fmt: skip
SPECS = {name: row.transformer for name, row in MODELS.items()}


@pytest.mark.parametrize("file", FILES)
def test_published_transformers(file: str) -> None:
    table, dialect, prefix, members, formats = FILES[file]
    opened = checkpoint(table)
    (part,) = identify(opened)
    assert (part.kind, part.dialect, part.prefix) == ("transformer", dialect, prefix)
    assert part.spec == SPECS[members[0]]
    assert (part.candidates, part.basis, part.unknown) == (members, "shape", ())
    sources = [source for group in part.names.values() for source in group]
    assert sorted(sources) == sorted(opened)
    assert {entry.storage for entry in opened.values()} == formats


def test_the_tables_are_complete() -> None:
    counts = {
        "official": 11_901_408_320, "diffusers": 11_901_408_320, "autoencoder": 83_819_683, "clip": 123_060_480,
        "t5": 4_762_310_656, "t5_llama": 4_762_310_656, "redux": 64_503_808,
    }  # fmt: skip
    assert {name: sum(map(prod, getattr(keytables, name)().values())) for name in counts} == counts
    assert len(keytables.official()) == 780
    assert len(keytables.official(64, False)) == 776


def test_an_all_in_one_file() -> None:
    opened = checkpoint(keytables.all_in_one())
    parts = {part.kind: part for part in identify(opened)}
    assert {kind: part.spec for kind, part in parts.items()} == {
        "transformer": TransformerSpec(), "clip": ClipSpec(), "t5": T5Spec(), "autoencoder": AutoencoderSpec(),
    }  # fmt: skip
    assert all(not part.unknown for part in parts.values())
    assert parts["autoencoder"].names["encoder.conv_in.weight"] == ("vae.encoder.conv_in.weight",)
    assert parts["t5"].names["shared.weight"] == ("text_encoders.t5xxl.transformer.shared.weight",)


@pytest.mark.parametrize(
    ("table", "kind", "dialect"),
    [
        (stored(keytables.autoencoder()), "autoencoder", "official"),
        (stored(keytables.clip() | {"vision_model.x": (1,), "logit_scale": ()}), "clip", "huggingface"),
        (stored(keytables.t5() | {"decoder.block.0.x": (1,), "lm_head.weight": (1,)}), "t5", "huggingface"),
        (scaled_fp8(keytables.t5()), "t5", "huggingface"),
        (gguf_mix(keytables.t5_llama(), "Q6_K"), "t5", "llama.cpp"),
        (stored(keytables.redux()), "redux", "official"),
    ],
)
def test_published_parts(table: Table, kind: str, dialect: str) -> None:
    (part,) = identify(checkpoint(table))
    specs = {"autoencoder": AutoencoderSpec(), "clip": ClipSpec(), "t5": T5Spec(), "redux": None}
    assert (part.kind, part.dialect, part.spec, part.unknown) == (kind, dialect, specs[kind], ())
    assert part.candidates == (("flux1-redux-dev",) if kind == "redux" else ())


def test_the_tower_of_redux() -> None:
    names = ["vision_model.post_layernorm.weight", "vision_model.head.probe", "text_model.embeddings.x", "logit_bias"]
    (part,) = identify(checkpoint(dict.fromkeys(names, ("F32", (2, 2)))))
    assert (part.kind, part.unknown, list(part.names)) == ("siglip", (), names[:1])


def test_clip_as_transformers_5_saves_it() -> None:
    table = {name.removeprefix("text_model."): shape for name, shape in keytables.clip().items()}
    (part,) = identify(checkpoint(stored(table)))
    assert (part.kind, part.spec, part.unknown) == ("clip", ClipSpec(), ())
    assert part.names.keys() == keytables.clip().keys()


def test_both_dialects_of_t5_have_the_same_names() -> None:
    (one,), (other,) = (identify(checkpoint(stored(t))) for t in (keytables.t5(), keytables.t5_llama()))
    assert one.names.keys() == other.names.keys() == keytables.t5().keys()


def test_t5_without_its_first_name_for_the_table_of_tokens() -> None:
    table = stored(keytables.t5())
    table["encoder.embed_tokens.weight"] = table.pop("shared.weight")
    (part,) = identify(checkpoint(table))
    assert part.names["shared.weight"] == ("encoder.embed_tokens.weight",)


def test_nano() -> None:
    parts = {part.kind: part for part in identify(open_checkpoint(ASSETS / "nano"))}
    row = MODELS["nano"]
    assert (parts["transformer"].spec, parts["transformer"].candidates) == (row.transformer, ("nano",))
    assert (parts["autoencoder"].spec, parts["text"].spec) == (row.autoencoder, row.text)


def test_a_config_says_what_shapes_cannot() -> None:
    state = to_diffusers(transformer(DEV, 0).state_dict(), DEV)
    assert identify(Checkpoint.of(state))[0].spec != DEV
    config = json.dumps({"axes_dims_rope": list(DEV.axes_dim)})
    assert identify(Checkpoint.of(state, {"config.json": config}))[0].spec == DEV
    state = to_diffusers(autoencoder(VAE, 0).state_dict(), VAE)
    config = json.dumps({"scaling_factor": 0.5, "shift_factor": 0.25, "norm_num_groups": 8})
    spec = identify(Checkpoint.of(state, {"config.json": config}))[0].spec
    assert spec == AutoencoderSpec(ch=32, num_res_blocks=1, scale_factor=0.5, shift_factor=0.25, norm_groups=8)
    assert identify(Checkpoint.of(state, {"config.json": "["}))[0].kind == "autoencoder"


# ---------------------------------------------------------------------------------------------- members

DEV_FILE = stored(keytables.official())


def told(file: str | None = None, metadata: dict[str, str] | None = None, sha256: str | None = None) -> Component:
    return identify(checkpoint(DEV_FILE, metadata, file), sha256)[0]


@pytest.mark.parametrize(
    ("file", "member"),
    [
        ("flux1-kontext-dev.safetensors", "flux1-kontext-dev"),
        ("FLUX1-Kontext_Q4_K_M.gguf", "flux1-kontext-dev"),
        ("flux1-krea-dev_fp8_scaled.safetensors", "flux1-krea-dev"),
        ("flux_dev.safetensors", "flux1-dev"),
        ("models--black-forest-labs--FLUX.1-Krea-dev/snapshots/1234/transformer/part.safetensors", "flux1-krea-dev"),
        ("FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors", "flux1-dev"),
    ],
)
def test_by_file_name(file: str, member: str) -> None:
    part = told(file)
    assert (part.candidates, part.basis) == ((member,), "file name")
    assert choose(part).name == member


@pytest.mark.parametrize(
    "file", [None, "model.safetensors", "kontext-krea-merge.safetensors", "flux1-schnell.safetensors"]
)
def test_names_that_do_not_tell(file: str | None) -> None:
    part = told(file)
    assert part.candidates == DEVS
    with pytest.raises(BadInput, match=r"fits flux1-dev, .*, try --variant flux1-kontext-dev"):
        choose(part)
    assert choose(part, "flux1-krea-dev").name == "flux1-krea-dev"
    with pytest.raises(BadInput, match="got variant 'flux1-fill-dev', allowed flux1-dev"):
        choose(part, "flux1-fill-dev")


@pytest.mark.parametrize(
    "metadata",
    [
        {"general.name": "Flux.1 Kontext"},
        {"modelspec.title": "flux kontext fp8"},
        {"model_index.json": '{"_class_name": "FluxKontextPipeline"}'},
        {"config.json": '{"_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev"}'},
    ],
)
def test_by_metadata(metadata: dict[str, str]) -> None:
    part = told("flux_dev.safetensors", metadata)
    assert (part.candidates, part.basis) == (("flux1-kontext-dev",), "metadata")


def test_by_hash() -> None:
    for name in ("flux1-dev", "flux1-kontext-dev"):
        source = MODELS[name].source
        assert source is not None
        part = told("flux1-krea-dev.safetensors", sha256=source.sha256)
        assert (part.candidates, part.basis) == ((name,), "sha256")
    assert told("flux1-krea-dev.safetensors", sha256="0" * 64).candidates == ("flux1-krea-dev",)


def test_pruned_models() -> None:
    table = {n: v for n, v in DEV_FILE.items() if not n.startswith(("double_blocks.18.", "single_blocks.37."))}
    (part,) = identify(checkpoint(table))
    assert part.candidates == ()
    with pytest.raises(BadInput, match=r"pruned.*try --variant flux1-dev"):
        choose(part)
    assert choose(part, "flux1-dev").transformer == TransformerSpec(depth=18, depth_single_blocks=37)
    with pytest.raises(BadInput, match="got variant 'flux1-schnell'"):
        choose(part, "flux1-schnell")


def test_loras() -> None:
    names = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 8), "x.alpha": torch.ones(())}
    (part,) = identify(Checkpoint.of(names))
    assert (part.kind, part.candidates) == ("lora", ())
    control = {"img_in.lora_A.weight": torch.ones(128, 128), "single_blocks.0.norm.key_norm.scale": torch.ones(128)}
    (part,) = identify(Checkpoint.of(control))
    assert part.candidates == ("flux1-canny-dev-lora", "flux1-depth-dev-lora")


# ---------------------------------------------------------------------------------------------- not ours


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["distilled_guidance_layer.in_proj.weight", "img_in.weight"], "Chroma"),
        (["double_stream_modulation_img.lin.weight", "img_in.weight", "txt_in.weight"], r"FLUX\.2"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.0.weight"], "SDXL"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"], "Stable Diffusion"),
        (["controlnet_blocks.0.weight", "x_embedder.weight"], "ControlNet"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen"),
        (["nonsense", "more"], "unknown kind"),
        ([], "no tensors"),
    ],
)
def test_other_models(names: list[str], what: str) -> None:
    with pytest.raises(WeightsError, match=what):
        identify(checkpoint(dict.fromkeys(names, ("F32", (2, 2)))))


def test_other_autoencoders() -> None:
    table = stored(keytables.autoencoder())
    for rows, what in ((8, "Stable Diffusion"), (64, r"FLUX\.2")):
        table["encoder.conv_out.weight"] = ("F32", (rows, 512, 3, 3))
        with pytest.raises(WeightsError, match=what):
            identify(checkpoint(table))


def test_an_sdxl_checkpoint_is_not_mistaken_for_its_autoencoder() -> None:
    table = stored({f"first_stage_model.{name}": shape for name, shape in keytables.autoencoder().items()})
    with pytest.raises(WeightsError, match="SDXL"):
        identify(checkpoint(table | {"conditioner.embedders.0.x": ("F32", (1,))}))


def test_what_has_no_place_is_kept_for_strict_loading() -> None:
    (part,) = identify(checkpoint(DEV_FILE | {"double_blocks.0.more": ("F32", (1,)), "extra": ("F32", (1,))}))
    assert part.unknown == ("double_blocks.0.more", "extra")


@pytest.mark.parametrize("shape", [(), (3072,), (0, 64), (3072, 64, 1)])
def test_shapes_that_tell_nothing(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="whose shape cannot be told"):
        identify(checkpoint(DEV_FILE | {"img_in.weight": ("F32", shape)}))


TOYS = {
    "official": {name: tuple(t.shape) for name, t in transformer(DEV, 0).state_dict().items()},
    "diffusers": {n: tuple(t.shape) for n, t in to_diffusers(transformer(DEV, 0).state_dict(), DEV).items()},
    "autoencoder": {name: tuple(t.shape) for name, t in autoencoder(VAE, 0).state_dict().items()},
    "clip": {name: shape for name, shape in keytables.clip().items() if ".layers.1" not in name},
    "t5": {name: shape for name, shape in keytables.t5().items() if not re.search(r"block\.[12]", name)},
}
SHAPES = st.lists(st.sampled_from([0, 1, 2, 24, 64, 384, 1 << 59]), max_size=4).map(tuple)


@given(st.sampled_from(sorted(TOYS)), st.data())
def test_fuzz(toy: str, data: st.DataObject) -> None:
    """Tensors taken away, renamed and misshapen: components, or a WeightsError."""
    names = sorted(TOYS[toy])
    table = dict(TOYS[toy])
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        table.pop(name, None)
    for name, shape in data.draw(st.lists(st.tuples(st.sampled_from(names), SHAPES), max_size=4)):
        table[name.replace("0", data.draw(st.sampled_from(["0", "9", "9999", "99999"])))] = shape
    with contextlib.suppress(WeightsError):
        opened = checkpoint(stored(table, "F32"))
        for part in identify(opened):
            need_fit(opened, part)


def test_opening_a_folder_finds_every_part(tmp_path: Path) -> None:
    for folder, state in {
        "transformer": to_diffusers(transformer(DEV, 0).state_dict(), DEV),
        "vae": to_diffusers(autoencoder(VAE, 0).state_dict(), VAE),
    }.items():
        (tmp_path / folder).mkdir()
        save_file(
            {n: t.contiguous() for n, t in state.items()}, tmp_path / folder / "diffusion_pytorch_model.safetensors"
        )
    parts = identify(open_checkpoint(tmp_path))
    assert [(part.kind, part.dialect, part.prefix) for part in parts] == [
        ("transformer", "diffusers", "transformer/"), ("autoencoder", "diffusers", "vae/"),
    ]  # fmt: skip
