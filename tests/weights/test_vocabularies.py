"""The tokenizers of CLIP and T5: published ids, transformers as the oracle, folders of checkpoints, damage."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxloom.errors import WeightsError
from fluxloom.weights.vocabularies import BUNDLED, FRAMES, Vocabulary, bundled, load_vocabulary

KNOWN = json.loads((Path(__file__).parents[1] / "fixtures" / "token_ids.json").read_text("utf-8"))
ROWS = [(encoder, text, ids) for encoder, rows in KNOWN.items() for text, ids in rows]
SAMPLES = [
    "a red bicycle on the beach at sunset",
    "It's 12 o'clock; don't you see? We've 3,000 <b>tags</b>!!",
    "naïve Ünïcode — “quotes”, ½ cup, ﬁne, ＡＢＣ",
    "  leading, trailing and   double  spaces  ",
    "lines\nand\ttabs\r\n",
    "日落时，海滩上有一辆红色的自行车",
    "emoji 🦊 and e\u0301 combined; zero\u200bwidth; \u00a0",
    "CAPS LOCK camelCase snake_case kebab-case",
    "<|endoftext|> </s> <pad> <extra_id_3>",
    "{braces} [brackets] \\ ~ ^ |",
]


@pytest.mark.parametrize(("encoder", "text", "ids"), ROWS)
def test_published_ids(encoder: str, text: str, ids: list[int]) -> None:
    frame = FRAMES[encoder]
    framed = [*frame.start, *ids, frame.end]
    length = len(framed) + 3
    assert bundled(encoder).encode(text, length) == framed + [frame.pad] * 3


def oracle(encoder: str) -> Any:
    """transformers' own tokenizer around the same vocabulary."""
    from transformers import CLIPTokenizer, T5Tokenizer

    document = json.loads(lzma.decompress((BUNDLED / f"{encoder}.json.xz").read_bytes()))
    if encoder == "clip":
        merges = [tuple(merge.split(" ")) for merge in document]
        return CLIPTokenizer(vocab=bundled("clip").model.get_vocab(), merges=merges)
    scores = [(piece, float(np.float32(score))) for piece, score in zip(*document["model"]["vocab"], strict=True)]
    made = T5Tokenizer(vocab=scores)
    made.backend_tokenizer.normalizer = bundled("t5").model.normalizer
    return made


@pytest.mark.parametrize("encoder", ["clip", "t5"])
def test_ids_are_those_of_transformers(encoder: str) -> None:
    theirs = oracle(encoder)
    for text in SAMPLES:
        for length in (77, 12):
            expected = theirs(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
            assert bundled(encoder).encode(text, length) == expected, text


@given(text=st.text(max_size=60), length=st.integers(2, 40))
def test_a_text_is_always_framed(text: str, length: int) -> None:
    for encoder in ("clip", "t5"):
        frame, words = FRAMES[encoder], bundled(encoder)
        ids = words.encode(text, length)
        assert len(ids) == length
        assert tuple(ids[: len(frame.start)]) == frame.start
        assert frame.end in ids
        whole = words.encode(text, 500)
        fits = whole[length - 1] in (frame.end, frame.pad) and whole[length:] == [frame.pad] * (500 - length)
        assert not (fits and words.cut(text, length))
        assert text.endswith(words.cut(text, length)) or words.cut(text, length) in text


def test_what_is_cut() -> None:
    clip, t5 = bundled("clip"), bundled("t5")
    text = "a red cat " * 25 + "in the Snow"
    assert clip.cut(text, 77) == "in the Snow"
    assert clip.encode(text, 77)[-1] == 49_407
    assert len(clip.cut("cat " * 80, 77).split()) == 5  # 75 fit between start and end
    assert len(t5.cut("cat " * 80, 77).split()) == 4  # 76 fit before the end
    assert clip.cut("cat " * 75, 77) == t5.cut("cat " * 76, 77) == ""


def test_what_t5_cannot_read() -> None:
    words = bundled("t5")
    assert words.unreadable("a 红色 cat in {braces}, 红色 again") == ["红色", "{", "}"]
    assert words.unreadable("façade, déjà vu, “quotes”, ﬁne, ＡＢＣ，") == []
    assert bundled("clip").unreadable("a 红色 cat in {braces}") == []


def test_bytes_that_are_no_text() -> None:
    text = b"a \xff cat".decode("utf-8", "surrogateescape")
    assert bundled("t5").encode(text, 9) == bundled("t5").encode("a  cat", 9)
    assert bundled("clip").encode(text, 77)[1] == 320


def test_lengths_too_short_for_the_frame() -> None:
    with pytest.raises(ValueError, match="start and end alone need 2"):
        bundled("clip").encode("a cat", 1)
    assert bundled("t5").encode("a cat", 1) == [1]


# ------------------------------------------------------------------------------------------------ folders


def fill(folder: Path, encoder: str, layout: str) -> Path:
    """A tokenizer folder as a published checkpoint has it."""
    folder.mkdir()
    words: Vocabulary = bundled(encoder)
    if layout == "tokenizer.json":
        words.model.save(str(folder / layout))
    else:
        merges = json.loads(lzma.decompress((BUNDLED / "clip.json.xz").read_bytes()))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        (folder / "vocab.json").write_text(json.dumps(words.model.get_vocab()), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("encoder", "layout"), [("clip", "vocab.json"), ("clip", "tokenizer.json"), ("t5", "tokenizer.json")]
)
def test_folders(encoder: str, layout: str, tmp_path: Path) -> None:
    words = load_vocabulary(encoder, fill(tmp_path / "tokenizer", encoder, layout))
    for text in SAMPLES:
        assert words.encode(text, 60) == load_vocabulary(encoder).encode(text, 60)


def test_padding_and_cutting_of_a_folder_do_not_count(tmp_path: Path) -> None:
    folder = fill(tmp_path / "tokenizer_2", "t5", "tokenizer.json")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    assert load_vocabulary("t5", folder).encode("a red cat in the snow", 30) == bundled("t5").encode(
        "a red cat in the snow", 30
    )


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tokenizer in .* allowed vocab\.json or tokenizer\.json, try without"):
        load_vocabulary("clip", tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe", b'{"model": 3}'])
@pytest.mark.parametrize(("encoder", "name"), [("t5", "tokenizer.json"), ("clip", "vocab.json")])
def test_damaged_tokenizers(encoder: str, name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(WeightsError, match=f"no usable tokenizer .*{name}|of another model"):
        load_vocabulary(encoder, tmp_path)


def test_a_vocabulary_without_its_merges(tmp_path: Path) -> None:
    folder = fill(tmp_path / "tokenizer", "clip", "vocab.json")
    (folder / "merges.txt").unlink()
    with pytest.raises(WeightsError, match="merges"):
        load_vocabulary("clip", folder)


def test_a_tokenizer_of_the_other_encoder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "tokenizer", "t5", "tokenizer.json")
    with pytest.raises(WeightsError, match=r"of another model \(<\|startoftext\|> is None"):
        load_vocabulary("clip", folder)


def test_files_too_large_to_be_a_vocabulary(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(WeightsError, match="are no vocabulary"):
        load_vocabulary("t5", tmp_path)


def test_the_bundled_files_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.glob("*.gz")) < 700_000
