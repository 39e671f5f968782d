"""The tokenizers of CLIP and T5: from a checkpoint's folder, or those that come with the package.

They run on the ``tokenizers`` package. Its padding, cutting and end tokens are not used: how FLUX.1 frames a text is a
row of :data:`FRAMES`, whatever a folder's configuration says.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxloom.errors import WeightsError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUNDLED = Path(__file__).parents[1] / "assets" / "tokenizers"  # built by recipes/tokenizers.py
MAX_BYTES = 64 * 2**20  # of a vocabulary file; T5's takes 2.4 MB

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Contractions, runs of letters, single digits, runs of other signs: from the CLIP repository.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around the pieces of a text.

    start    ids before them
    end      the id after the last, which also closes a text that was cut
    pad      the id that fills up to the length
    unknown  the id of what no piece can spell; None where bytes spell everything
    pins     ids that a vocabulary must have to be the one the model was trained with
    """

    start: tuple[int, ...] = ()
    end: int
    pad: int
    unknown: int | None = None
    pins: Mapping[str, int]


# Sources: the published tokenizers of openai/clip-vit-large-patch14 and google/t5-v1_1-xxl.
FRAMES: Mapping[str, Frame] = MappingProxyType(
    {
        "clip": Frame(
            start=(49_406,),
            end=49_407,
            pad=49_407,
            pins={CLIP_START: 49_406, CLIP_END: 49_407, "cat</w>": 2_368, "photo</w>": 1_125},
        ),
        "t5": Frame(end=1, pad=0, unknown=2, pins={"<pad>": 0, "</s>": 1, "<unk>": 2, "▁house": 629, "▁The": 37}),
    }
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Texts to ids of one encoder, framed as FLUX.1 frames them."""

    model: Tokenizer
    frame: Frame

    def encode(self, text: str, length: int) -> list[int]:
        """Exactly ``length`` ids: start, pieces (cut if too many), end, padding."""
        frame = self.frame
        room = self._room(length)
        ids = [*frame.start, *self._pieces(text).ids[:room], frame.end]
        return ids + [frame.pad] * (length - len(ids))

    def cut(self, text: str, length: int) -> str:
        """The end of a text that :meth:`encode` cuts off; empty where it fits."""
        offsets, room = self._pieces(text).offsets, self._room(length)
        return text[offsets[room][0] :].strip() if len(offsets) > room else ""

    def unreadable(self, text: str) -> list[str]:
        """The parts of a text that no piece spells: the model is told only that there is something."""
        pieces = self._pieces(text)
        found = [text[a:b] for id_, (a, b) in zip(pieces.ids, pieces.offsets, strict=True) if id_ == self.frame.unknown]
        return list(dict.fromkeys(part.strip() for part in found if part.strip()))

    def _pieces(self, text: str) -> Any:
        """A terminal hands bytes that are no text on as lone surrogates; the tokenizers package stops at them."""
        return self.model.encode(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text), add_special_tokens=False)

    def _room(self, length: int) -> int:
        room = length - len(self.frame.start) - 1
        if room < 0:
            raise ValueError(f"got a text length of {length}; start and end alone need {length - room}")
        return room


def load_vocabulary(encoder: str, folder: Path | str | None = None) -> Vocabulary:
    """The tokenizer of an encoder, "clip" or "t5", from a folder of a checkpoint (``tokenizer/``, ``tokenizer_2/``).

    Without a folder it is the one that comes with the package. Raises WeightsError where the folder holds none, a
    damaged one, or one of another model.
    """
    return bundled(encoder) if folder is None else _from_folder(encoder, Path(folder))


@cache
def bundled(encoder: str) -> Vocabulary:
    """The tokenizer of an encoder that comes with the package."""
    return _checked(encoder, BUNDLED / f"{encoder}.json.xz", _BUNDLED[encoder])


def _from_folder(encoder: str, folder: Path) -> Vocabulary:
    for name, read in _LAYOUTS[encoder].items():
        if (folder / name).is_file():
            return _checked(encoder, folder / name, read)
    raise WeightsError(
        f"got no tokenizer in {folder}, allowed {' or '.join(_LAYOUTS[encoder])}, try without the folder: "
        f"the package has one for {encoder}"
    )


def _checked(encoder: str, path: Path, read: Callable[[Path], Tokenizer]) -> Vocabulary:
    """Read a file and make sure that it is the vocabulary the encoder was trained with."""
    frame = FRAMES[encoder]
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are no vocabulary")
        model = read(path)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise WeightsError(f"got no usable tokenizer {path} ({error}), try fetching it anew") from error
    found = {piece: model.token_to_id(piece) for piece in frame.pins}
    if found != frame.pins:
        other = ", ".join(f"{piece} is {id_}" for piece, id_ in found.items() if id_ != frame.pins[piece])
        raise WeightsError(f"got a tokenizer {path} of another model ({other}), allowed that of {encoder}, try another")
    model.no_padding()
    model.no_truncation()
    return Vocabulary(model, frame)


# ------------------------------------------------------------------------------------------------ files


def _whole(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(path.read_text("utf-8"))


def _vocabulary_and_merges(path: Path) -> Tokenizer:
    vocabulary = json.loads(path.read_text("utf-8"))
    lines = path.with_name("merges.txt").read_text("utf-8").splitlines()
    return _clip(vocabulary, [line for line in lines if line and not line.startswith("#version")])


def _bundled_clip(path: Path) -> Tokenizer:
    """From the merges alone: the ids are bytes, bytes that end a word, merges in order, start and end."""
    merges = json.loads(lzma.decompress(path.read_bytes()))
    pieces = [*_byte_letters(), *(f"{letter}</w>" for letter in _byte_letters())]
    pieces += [merge.replace(" ", "", 1) for merge in merges]
    return _clip({piece: i for i, piece in enumerate([*pieces, CLIP_START, CLIP_END])}, merges)


def _bundled_t5(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    document = json.loads(lzma.decompress(path.read_bytes()))
    pieces, scores = document["model"]["vocab"]
    exact = np.array(scores, np.float32).astype(float).tolist()  # kept as the shortest texts of float32
    document["model"]["vocab"] = list(zip(pieces, exact, strict=True))
    return Tokenizer.from_str(json.dumps(document))


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of CLIP's ids: printable Latin-1 stands for itself and
    comes first, the rest are letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _clip(vocabulary: dict[str, int], merges: list[str]) -> Tokenizer:
    """Byte-level pairs on lower-case words, as published."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    model = Tokenizer(BPE(vocab=vocabulary, merges=pairs, end_of_word_suffix="</w>", unk_token=CLIP_END))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens([AddedToken(text, special=True) for text in (CLIP_START, CLIP_END)])
    return model


# How a folder may hold a tokenizer, best first.
_LAYOUTS: Mapping[str, Mapping[str, Callable[[Path], Tokenizer]]] = {
    "clip": {"vocab.json": _vocabulary_and_merges, "tokenizer.json": _whole},
    "t5": {"tokenizer.json": _whole},
}
_BUNDLED: Mapping[str, Callable[[Path], Tokenizer]] = {"clip": _bundled_clip, "t5": _bundled_t5}
