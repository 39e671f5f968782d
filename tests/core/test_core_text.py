"""nano's tokenizer and text tower."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxloom.core.specs import TextSpec
from fluxloom.core.text import SPECIALS, TextStates, TextTower, Tokenizer, split_words

VOCABULARY = [
    *SPECIALS,
    *("a", "red", "bicycle", "beach", "the", "sign", "says", "bi", "##cycle", "##s", "sun", "##flower", "no", "3"),
    *('"', ",", "."),
    *"OPEN7",
    *"红色的自行车海滩,",
]
LENGTH = 12


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCABULARY, LENGTH)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Back from ids, without padding."""
    ids = tokenizer.encode(text)
    assert len(ids) == LENGTH
    words = [VOCABULARY[i] for i in ids]
    assert words[0] == "[CLS]"
    content = [word for word in words[1:] if word != "[PAD]"]
    assert words == ["[CLS]", *content, *["[PAD]"] * (LENGTH - 1 - len(content))]
    return content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red Bicycle", "a red bicycle"),
        ("  a,red.  ", "a , red ."),
        ("bicycles sunflowers", "bicycle ##s sun ##flower ##s"),
        ("3 beach", "3 beach"),
        ("红色的自行车", "红 色 的 自 行 车"),
        ("红色 bicycle", "红 色 bicycle"),
        ('the sign says "open"', 'the sign says " O P E N "'),
        ("sign “OPEN 7”", 'sign " O P E N 7 "'),
        ("「open」 a", '" O P E N " a'),
        ("『no』", '" N O "'),
        ("NO no", "no no"),
        ('"open', '" [UNK]'),
        ("xylophone", "[UNK]"),
        ("redx", "[UNK]"),
        ("😀", "[UNK]"),
        ("[PAD] [CLS]", "[UNK] [UNK] [UNK] [UNK] [UNK] [UNK]"),
        ("##s", "[UNK] [UNK] [UNK]"),
        ("", ""),
        (" \n\t ", ""),
        ('""', '" "'),
    ],
)
def test_encode(tokenizer: Tokenizer, text: str, expected: str) -> None:
    assert pieces(tokenizer, text) == expected.split()


def test_a_sign_is_spelled_and_a_word_is_not(tokenizer: Tokenizer) -> None:
    assert split_words('Red "Red" red') == ["red", '"', "R", "E", "D", '"', "red"]
    assert split_words('"a" b "c"') == ['"', "A", '"', "b", '"', "C", '"']


def test_overflow(tokenizer: Tokenizer) -> None:
    """What is cut is told, and what fits is not touched."""
    fits = " ".join(["red"] * (LENGTH - 1))
    assert tokenizer.overflow(fits) == []
    assert pieces(tokenizer, fits) == ["red"] * (LENGTH - 1)
    assert tokenizer.overflow(fits + " beach bicycles") == ["beach", "bicycle", "##s"]
    assert tokenizer.encode(fits + " beach") == tokenizer.encode(fits)


def test_unknown(tokenizer: Tokenizer) -> None:
    assert tokenizer.unknown("a red xylophone, 猫 bicycles") == ["xylophone", "猫"]
    assert tokenizer.unknown("a red bicycle") == []
    letters = Tokenizer([*SPECIALS, "fox", "##e", "##n", "##s", "o", "##v"], LENGTH)
    assert letters.pieces("oven") == ["o", "##v", "##e", "##n"]
    assert letters.unknown("fox foxs o oven foxes") == ["oven", "foxes"]


@given(st.text(max_size=60))
def test_any_text_encodes(text: str) -> None:
    tokenizer = Tokenizer(VOCABULARY, LENGTH)
    ids = tokenizer.encode(text)
    assert len(ids) == LENGTH
    assert all(0 <= i < len(VOCABULARY) for i in ids)
    cut = tokenizer.overflow(text)
    assert [VOCABULARY[i] for i in ids if i != 0][1:] + cut == tokenizer.pieces(text)


def test_a_long_word_takes_no_time() -> None:
    """Ten thousand letters in one word: linear, not cubic."""
    tokenizer = Tokenizer([*SPECIALS, "ab", "##ab"], LENGTH)
    start = time.perf_counter()
    assert len(tokenizer.pieces("ab" * 5000)) == 5000
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("vocabulary", [[], ["a", "b", "c"], ["[CLS]", "[PAD]", "[UNK]", "a"]])
def test_a_vocabulary_begins_with_the_specials(vocabulary: list[str]) -> None:
    with pytest.raises(ValueError, match="got a vocabulary that begins with"):
        Tokenizer(vocabulary, LENGTH)


SPEC = TextSpec(vocab_size=len(VOCABULARY), width=16, layers=2, heads=2, max_length=LENGTH)


def tower(seed: int = 1) -> TextTower:
    torch.manual_seed(seed)
    out = TextTower(SPEC).eval().requires_grad_(False)
    out.position.copy_(torch.randn_like(out.position))
    return out


def test_tower(tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("a red bicycle"), tokenizer.encode("红色的自行车")])
    states = tower()(ids)
    assert isinstance(states, TextStates)
    assert states.tokens.shape == (2, LENGTH, 16)
    assert states.pooled.shape == (2, 16)
    assert torch.equal(states.pooled, states.tokens[:, 0])
    again = tower()(ids)
    assert torch.equal(again.tokens, states.tokens)
    torch.testing.assert_close(tower()(ids[1:]).tokens, states.tokens[1:])


def test_tower_reads_words_and_their_order(tokenizer: Tokenizer) -> None:
    model = tower()
    texts = ["a red bicycle", "a red beach", "red a bicycle", "a red bicycle a"]
    pooled = model(torch.tensor([tokenizer.encode(text) for text in texts])).pooled
    distances = torch.pdist(pooled)
    assert float(distances.min()) > 1e-2


def test_tower_takes_shorter_texts() -> None:
    assert tower()(torch.zeros(1, 5, dtype=torch.int64)).tokens.shape == (1, 5, 16)


def test_gradients_reach_every_weight(tokenizer: Tokenizer) -> None:
    model = TextTower(SPEC)
    states = model(torch.tensor([tokenizer.encode("a red bicycle")]))
    (states.tokens.square().sum() * states.pooled.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
