"""Readers: nano's own tower, and CLIP with T5: lengths, padding, what is cut, what T5 cannot read, translations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from pico import LENGTH, SPEC
from tiny import randomise, relative

from fluxloom.core.clip import ClipText
from fluxloom.core.specs import MODELS, ClipSpec, T5Spec
from fluxloom.core.t5 import T5Encoder
from fluxloom.errors import BadInput, Failure
from fluxloom.infer.reading import OwnTower, Reader, Recent, TextPairReader, pair_reader
from fluxloom.infer.runtime import Runtime
from fluxloom.infer.translate import ChatTranslator
from fluxloom.weights.vocabularies import bundled

DEV = replace(MODELS["flux1-dev"], text_length=24)
CPU = torch.device("cpu")


@dataclass
class Dictionary:
    """A translator that knows some prompts."""

    known: dict[str, str]
    asked: list[str] = field(default_factory=list)

    def translate(self, text: str) -> str:
        self.asked.append(text)
        return self.known[text]


def make(translator: Dictionary | None = None, text_length: int = 24) -> TextPairReader:
    """A reader with real vocabularies and toy networks."""
    clip = randomise(ClipText(ClipSpec(width=16, layers=1, heads=2, mlp=16)), 1)
    t5 = randomise(T5Encoder(T5Spec(width=12, layers=1, heads=2, head_dim=4, mlp=16)), 2)
    assert isinstance(clip, ClipText)
    assert isinstance(t5, T5Encoder)
    spec = replace(DEV, text_length=text_length)
    return pair_reader(spec, clip, t5, (bundled("clip"), bundled("t5")), translator)


@pytest.fixture(scope="module")
def reader() -> TextPairReader:
    return make()


# ------------------------------------------------------------------------------------------------ states


def test_states_are_those_of_both_towers(reader: TextPairReader) -> None:
    """Framed and padded as FLUX.1 does it, nothing masked."""
    states = reader.read("a photo of a cat")
    clip_ids = torch.tensor([[49_406, 320, 1125, 539, 320, 2368, *[49_407] * 71]])
    t5_ids = torch.tensor([[3, 9, 1202, 13, 3, 9, 1712, 1, *[0] * 16]])
    assert torch.equal(states.pooled, reader.clip(clip_ids)[1])
    assert torch.equal(states.tokens, reader.t5(t5_ids))
    assert (states.tokens.shape, states.pooled.shape) == ((1, 24, 12), (1, 16))


def test_the_length_belongs_to_the_request(reader: TextPairReader) -> None:
    short, long = reader.read("a cat", text_length=10), reader.read("a cat")
    assert short.tokens.shape == (1, 10, 12)
    assert torch.equal(short.pooled, long.pooled)
    assert relative(short.tokens, long.tokens[:, :10]) > 1e-3  # the padding is attended
    with pytest.raises(BadInput, match="text_length 25, allowed 1 to 24, try 24"):
        reader.read("a cat", text_length=25)
    with pytest.raises(BadInput, match="text_length 0"):
        reader.notes("a cat", text_length=0)


def test_a_prompt_for_t5_alone(reader: TextPairReader) -> None:
    cat, dog = reader.read("a cat"), reader.read("a dog")
    both = reader.read("a cat", prompt_t5="a dog")
    assert torch.equal(both.pooled, cat.pooled)
    assert torch.equal(both.tokens, dog.tokens)
    empty = reader.read("a cat", prompt_t5="")
    assert torch.equal(empty.tokens, reader.read("").tokens)


def test_states_are_remembered() -> None:
    reader = make()
    states = reader.read("a cat")
    assert reader.read("a cat") is states
    assert reader.read("a cat", prompt_t5="a cat", text_length=24) is states
    assert reader.read("a cat", prompt_t5="a dog") is not states
    assert reader.read("a cat", text_length=23) is not states
    reader.place(CPU, torch.bfloat16)
    again = reader.read("a cat")
    assert (again.tokens.dtype, again.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert reader.t5.shared.weight.dtype == torch.float32  # the networks keep the dtype of their weights
    assert torch.equal(again.tokens, states.tokens.to(torch.bfloat16))


def test_recent_forgets_what_was_used_longest_ago() -> None:
    recent: Recent[list[int]] = Recent(2)
    first = recent.get("a", lambda: [1])
    recent.get("b", lambda: [2])
    assert recent.get("a", lambda: [3]) is first
    recent.get("c", lambda: [4])
    assert recent.get("a", lambda: [5]) is first
    assert recent.get("b", lambda: [6]) == [6]


@pytest.mark.parametrize("encoder", ["t5", "clip"])
def test_states_that_are_not_finite(encoder: str) -> None:
    """T5 XXL overflows float16 in its feed-forward layers; no picture comes of that."""
    reader = make()
    network = {"t5": reader.t5, "clip": reader.clip}[encoder].half()
    norm = next(module for name, module in network.named_modules() if name.endswith("final_layer_norm"))
    norm.weight.data *= 60_000
    with pytest.raises(Failure, match=f"states from {encoder.upper()} in float16 .*try bfloat16 or float32"):
        reader.read("a cat")


# ------------------------------------------------------------------------------------------------ notes


@pytest.mark.parametrize("prompt", ["a photo of a cat", "", "it's 12 o'clock: “déjà vu”!"])
def test_prompts_that_reach_the_model_whole(reader: TextPairReader, prompt: str) -> None:
    assert reader.notes(prompt) == []


def test_notes_tell_what_was_cut(reader: TextPairReader) -> None:
    [note] = reader.notes("cat " * 23 + "dog in the Snow")
    assert note == "the prompt is too long for flux1-dev (24 tokens of T5); this was cut off: dog in the Snow"
    t5, clip = reader.notes("cat " * 75 + "and dog")
    assert "… and 34 more" in t5
    assert clip == "CLIP reads only 77 tokens, not the end: and dog"
    [note] = make(text_length=512).notes("cat " * 75 + "and dog")
    assert note == "CLIP reads only 77 tokens, not the end, which T5 reads: and dog"
    [note] = reader.notes("cat " * 75 + "and dog", prompt_t5="a dog")
    assert note == "CLIP reads only 77 tokens, not the end: and dog"
    assert "too long" in reader.notes("a cat", text_length=3, prompt_t5="a very red cat")[0]


def test_notes_tell_what_t5_cannot_read(reader: TextPairReader) -> None:
    [note] = reader.notes("红色的自行车 on {stairs}")
    assert "T5, which reads prompts for flux1-dev, cannot read: 红色的自行车 { }" in note
    assert note.endswith("; write English, or set FLUXLOOM_TRANSLATOR_URL")
    [note] = reader.notes("a {naïve} cat")
    assert note.endswith("cannot read: { ï }")  # nothing that a translation would help
    assert reader.notes("红色", prompt_t5="red") == []
    assert "红色" in reader.notes("red", prompt_t5="红色")[0]


# ------------------------------------------------------------------------------------------------ translation


def test_a_translation_is_read_and_told() -> None:
    words = Dictionary({"一只红猫": "a red cat"})
    reader, plain = make(words), make()
    assert reader.translation("一只红猫") == "a red cat"
    assert torch.equal(reader.read("一只红猫").tokens, plain.read("a red cat").tokens)
    assert torch.equal(reader.read("一只红猫").pooled, plain.read("a red cat").pooled)
    assert reader.notes("一只红猫") == ["flux1-dev reads English; this was read: a red cat"]
    assert words.asked == ["一只红猫"]  # once
    assert relative(plain.read("一只红猫").tokens, plain.read("a red cat").tokens) > 1e-3


def test_what_needs_no_translation_is_not_sent() -> None:
    words = Dictionary({})
    reader = make(words)
    for prompt in ("a red cat", "a {naïve} cat 🦊", ""):
        assert reader.translation(prompt) is None
        reader.read(prompt)
    assert words.asked == []
    assert make().translation("一只红猫") is None


def test_both_prompts_are_translated() -> None:
    reader, plain = make(Dictionary({"猫": "cat", "狗": "dog"})), make()
    states, expected = reader.read("猫", prompt_t5="狗"), plain.read("cat", prompt_t5="dog")
    assert torch.equal(states.tokens, expected.tokens)
    assert torch.equal(states.pooled, expected.pooled)
    assert [note.rpartition(": ")[2] for note in reader.notes("猫", prompt_t5="狗")] == ["cat", "dog"]


def test_a_translation_that_still_cannot_be_read() -> None:
    reader = make(Dictionary({"写着“你好”的牌子": "a sign that says “你好”"}))
    told, unreadable = reader.notes("写着“你好”的牌子")
    assert told.endswith("a sign that says “你好”")
    assert unreadable.endswith("cannot read: 你好")


def test_a_receipt_s_translation_is_read_again() -> None:
    words = Dictionary({"猫": "a dog"})
    reader, plain = make(words), make()
    reader.recall("猫", "cat")
    assert reader.translation("猫") == "cat"
    assert torch.equal(reader.read("猫").tokens, plain.read("cat").tokens)
    plain.recall("猫", "cat")  # also where no translator is configured
    assert torch.equal(plain.read("猫").tokens, plain.read("cat").tokens)
    assert words.asked == []


def test_the_translator_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make().translator is None
    monkeypatch.setenv("FLUXLOOM_TRANSLATOR_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("FLUXLOOM_TRANSLATOR_MODEL", "small")
    assert make().translator == ChatTranslator(url="http://127.0.0.1:9/v1", model="small")
    given = Dictionary({})
    assert make(given).translator is given


# ------------------------------------------------------------------------------------------------ nano


def test_own_tower_reads_one_prompt_of_one_length(runtime: Runtime) -> None:
    reader: Reader = runtime.reader
    assert isinstance(reader, OwnTower)
    assert runtime.read("a red cat", text_length=LENGTH) is runtime.read("a red cat")
    assert reader.translation("猫") is None
    with pytest.raises(BadInput, match="prompt for T5, which pico has not"):
        runtime.read("a cat", prompt_t5="a dog")
    with pytest.raises(BadInput, match=f"text_length 5 for {SPEC.name}, allowed only {LENGTH}"):
        runtime.notes("a cat", text_length=5)
    with pytest.raises(BadInput, match="reads prompts as they are"):
        reader.recall("猫", "cat")
