"""Names of the text encoders' tensors: tables that invert, and other programs' own tables as oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import randomise
from torch import Tensor, nn

from fluxloom.core.clip import ClipText
from fluxloom.core.specs import ClipSpec, T5Spec
from fluxloom.core.t5 import T5Encoder
from fluxloom.errors import WeightsError
from fluxloom.weights.load import load_strict
from fluxloom.weights.text_dialects import TEXT_DIALECTS, TextDialect, dialect_of, text_names

CLIP = ClipSpec(vocab_size=20, width=16, layers=2, heads=2, mlp=24, max_length=8)
T5 = T5Spec(vocab_size=20, width=16, layers=2, heads=2, head_dim=4, mlp=24)


def module(encoder: str) -> nn.Module:
    return ClipText(CLIP) if encoder == "clip" else T5Encoder(T5)


def by_name(encoder: str, name: str) -> TextDialect:
    return next(row for row in TEXT_DIALECTS if (row.encoder, row.name) == (encoder, name))


@pytest.mark.parametrize("dialect", TEXT_DIALECTS, ids=lambda row: f"{row.encoder} {row.name}")
def test_round_trip(dialect: TextDialect) -> None:
    """There and back, and a state of such names loads into our module, every tensor in its place."""
    state = randomise(module(dialect.encoder), 1).state_dict()
    foreign = {dialect.theirs(name): tensor for name, tensor in state.items()}
    assert len(foreign) == len(state)
    assert {dialect.ours(name) for name in foreign} == state.keys()
    assert dialect_of(dialect.encoder, foreign) is dialect
    names = text_names(dialect.encoder, foreign)
    loaded = module(dialect.encoder)
    load_strict(loaded, {ours: foreign[theirs] for ours, theirs in names.items()})
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)


def test_names_of_llama_cpp_are_those_of_its_own_table() -> None:
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5.layers)
    dialect = by_name("t5", "llama.cpp")
    for name in T5Encoder(T5).state_dict():
        assert dialect.theirs(name) == f"{table.get_name(name.removesuffix('.weight'))}.weight"


@pytest.mark.filterwarnings("ignore:.*token_id must be:UserWarning")
def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Whichever version is installed: 5 saves CLIP's text tower without text_model."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=19,
    )  # fmt: skip
    t5 = T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    for encoder, model in (("clip", CLIPTextModel(clip)), ("t5", T5EncoderModel(t5))):
        model.save_pretrained(tmp_path / encoder)
        with safe_open(tmp_path / encoder / "model.safetensors", "pt") as file:
            assert text_names(encoder, file.keys()).keys() == module(encoder).state_dict().keys()


def keys(encoder: str) -> dict[str, Tensor]:
    return dict(module(encoder).state_dict())


@pytest.mark.parametrize(
    ("encoder", "more"),
    [
        ("clip", ["text_model.embeddings.position_ids", "text_projection.weight", "logit_scale"]),
        ("clip", ["vision_model.post_layernorm.weight", "visual_projection.weight"]),
        ("t5", ["encoder.embed_tokens.weight", "logit_scale", "spiece_model"]),
        ("t5", ["decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"]),
    ],
)
def test_what_files_hold_besides_is_not_used(encoder: str, more: list[str]) -> None:
    own = keys(encoder)
    assert text_names(encoder, [*own, *more]) == {name: name for name in own}


def test_t5_s_tokens_under_their_other_name() -> None:
    own = list(keys("t5"))
    other = [name.replace("shared", "encoder.embed_tokens") for name in own]
    assert text_names("t5", other)["shared.weight"] == "encoder.embed_tokens.weight"
    assert text_names("t5", other).keys() == set(own)


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_unknown_names_are_kept_for_strict_loading_to_refuse(encoder: str, tmp_path: Path) -> None:
    save_file({**keys(encoder), "adapter.weight": torch.ones(2)}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        names = text_names(encoder, file.keys())
        state = {ours: file.get_tensor(theirs) for ours, theirs in names.items()}
    with pytest.raises(WeightsError, match=r"unknown: adapter\.weight"):
        load_strict(module(encoder), state)


def test_files_of_something_else() -> None:
    with pytest.raises(WeightsError, match=r"got img_in\.weight for t5, allowed files with encoder\.block"):
        dialect_of("t5", ["img_in.weight"])
    with pytest.raises(WeightsError, match="got no tensors for clip"):
        dialect_of("clip", [])
