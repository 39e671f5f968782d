"""From a prompt to text states: what reads it, what of it is lost on the way, and what is remembered."""

from __future__ import annotations

import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fluxloom.core.clip import ClipText
from fluxloom.core.specs import ModelSpec
from fluxloom.core.t5 import T5Encoder
from fluxloom.core.text import TextStates, TextTower, Tokenizer
from fluxloom.errors import BadInput, Failure
from fluxloom.infer import translate
from fluxloom.infer.translate import Translator
from fluxloom.weights.vocabularies import Vocabulary

REMEMBERED = 64  # states of a prompt take some 50 kB for nano, 4 MB for the 12 B members

Value = TypeVar("Value")


class Reader(Protocol):
    """Reads prompts for one model.

    ``prompt_t5`` is another text for T5, where the model has one besides CLIP; ``text_length`` the tokens of text to
    give to the model, its own number unless given.
    """

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute on a device, and answer in a dtype (the networks keep that of their weights)."""
        ...

    def read(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
        """States of a prompt: tokens [1, L, C] and pooled [1, C']; the same object while it is remembered."""
        ...

    def notes(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> list[str]:
        """What of a prompt does not reach the model, in sentences for the user."""
        ...

    def translation(self, prompt: str) -> str | None:
        """What is read in place of a prompt, where it is translated."""
        ...

    def recall(self, prompt: str, translation: str) -> None:
        """Read a translation from a receipt for this prompt, instead of asking for a new one."""
        ...


class Recent(Generic[Value]):
    """The values that were used last, by what they were made from."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self.size = size
        self._values: OrderedDict[object, Value] = OrderedDict()

    def get(self, key: object, make: Callable[[], Value]) -> Value:
        if key not in self._values:
            self.put(key, make())
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: object, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self.size:
            self._values.popitem(last=False)

    def clear(self) -> None:
        self._values.clear()


@dataclass
class OwnTower:
    """nano's reader: one small tower, trained with the model on texts of one length."""

    name: str
    tower: TextTower
    tokenizer: Tokenizer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    _states: Recent[TextStates] = field(default_factory=Recent, repr=False)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.tower.to(device)
        self._states.clear()

    @torch.inference_mode()
    def read(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
        self._check(prompt_t5, text_length)
        return self._states.get(prompt, lambda: self._read(prompt))

    def notes(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> list[str]:
        """Pieces beyond the text length, and words that nano does not know."""
        self._check(prompt_t5, text_length)
        found = []
        cut = self.tokenizer.overflow(prompt)
        if cut:
            text = listed(" ".join(cut).replace(" ##", "").removeprefix("##").split(), " ")
            found.append(f"the prompt is too long for {self.name}; this was cut off: {text}")
        unknown = list(dict.fromkeys(self.tokenizer.unknown(prompt)))
        if unknown:
            found.append(f"{self.name} does not know these words: {listed(unknown, ', ')}")
        return found

    def translation(self, prompt: str) -> str | None:
        return None

    def recall(self, prompt: str, translation: str) -> None:
        raise BadInput(f"got a translation for {self.name}, which reads prompts as they are, allowed none, try without")

    def _read(self, prompt: str) -> TextStates:
        states = self.tower(torch.tensor([self.tokenizer.encode(prompt)], device=self.device))
        return TextStates(states.tokens.to(self.dtype), states.pooled.to(self.dtype))

    def _check(self, prompt_t5: str | None, text_length: int | None) -> None:
        if prompt_t5 is not None:
            raise BadInput(f"got a prompt for T5, which {self.name} has not, allowed one prompt, try leaving it out")
        own = self.tokenizer.max_length
        if text_length not in (None, own):
            raise BadInput(f"got text_length {text_length} for {self.name}, allowed only {own}, try leaving it out")


@dataclass
class TextPairReader:
    """The reader of the 12 B members: CLIP's pooled state and T5's token states of one text, or of one text each.

    CLIP reads the first 77 tokens (start and end among them), T5 ``text_length``; both texts are padded to these
    lengths and the padding is attended, as the models were trained. T5 v1.1 knows no Chinese, and CLIP saw little:
    where a text has letters that T5 cannot read and there is a translator, both read the translation.
    """

    name: str
    clip: ClipText
    t5: T5Encoder
    clip_words: Vocabulary
    t5_words: Vocabulary
    text_length: int
    translator: Translator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    _states: Recent[TextStates] = field(default_factory=Recent, repr=False)
    _english: Recent[str] = field(default_factory=lambda: Recent(1024), repr=False)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.clip.to(device)
        self.t5.to(device)
        self._states.clear()

    @torch.inference_mode()
    def read(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> TextStates:
        texts = self._english_of(prompt), self._english_of(prompt if prompt_t5 is None else prompt_t5)
        length = self._length(text_length)
        return self._states.get((*texts, length), lambda: self._read(*texts, length))

    def notes(self, prompt: str, *, prompt_t5: str | None = None, text_length: int | None = None) -> list[str]:
        """What was translated, what T5 cannot read, and what was cut from either tower."""
        length, other = self._length(text_length), prompt if prompt_t5 is None else prompt_t5
        english, english_t5 = self._english_of(prompt), self._english_of(other)
        pairs = dict.fromkeys(((prompt, english), (other, english_t5)))
        found = [f"{self.name} reads English; this was read: {new}" for old, new in pairs if old != new]
        unreadable = self.t5_words.unreadable(english_t5)
        if unreadable:
            hint = "" if self.translator or not _letters(unreadable) else f"; write English, or set {translate.URL}"
            found.append(f"T5, which reads prompts for {self.name}, cannot read: {listed(unreadable, ' ')}{hint}")
        cut_t5 = self.t5_words.cut(english_t5, length)
        if cut_t5:
            words = listed(cut_t5.split(), " ")
            found.append(f"the prompt is too long for {self.name} ({length} tokens of T5); this was cut off: {words}")
        cut = self.clip_words.cut(english, self.clip.spec.max_length)
        if cut:
            other_reads = ", which T5 reads" if prompt_t5 is None and not cut_t5 else ""
            words = listed(cut.split(), " ")
            found.append(f"CLIP reads only {self.clip.spec.max_length} tokens, not the end{other_reads}: {words}")
        return found

    def translation(self, prompt: str) -> str | None:
        english = self._english_of(prompt)
        return None if english == prompt else english

    def recall(self, prompt: str, translation: str) -> None:
        self._english.put(prompt, translation)

    def _english_of(self, text: str) -> str:
        """The text to read for a prompt: its own, or its translation, asked for once."""

        def ask() -> str:
            if self.translator is None or not _letters(self.t5_words.unreadable(text)):
                return text
            return self.translator.translate(text)

        return self._english.get(text, ask)

    def _read(self, text: str, text_t5: str, length: int) -> TextStates:
        ids = self.clip_words.encode(text, self.clip.spec.max_length)
        _, pooled = self.clip(torch.tensor([ids], device=self.device))
        tokens = self.t5(torch.tensor([self.t5_words.encode(text_t5, length)], device=self.device))
        return TextStates(self._finite("T5", tokens), self._finite("CLIP", pooled))

    def _finite(self, encoder: str, states: Tensor) -> Tensor:
        if not torch.isfinite(states).all():
            kept = str(states.dtype).removeprefix("torch.")
            raise Failure(
                f"got text states from {encoder} in {kept} that are not finite (the feed-forward layers of T5 overflow "
                "float16), allowed finite ones, try bfloat16 or float32 for the text encoders"
            )
        return states.to(self.dtype)

    def _length(self, text_length: int | None) -> int:
        length = self.text_length if text_length is None else text_length
        if not 1 <= length <= self.text_length:
            raise BadInput(f"got text_length {length}, allowed 1 to {self.text_length}, try {self.text_length}")
        return length


def pair_reader(
    spec: ModelSpec,
    clip: ClipText,
    t5: T5Encoder,
    vocabularies: tuple[Vocabulary, Vocabulary],
    translator: Translator | None = None,
) -> TextPairReader:
    """The reader of a member with its loaded encoders and (CLIP, T5) vocabularies; the translator is that of the
    environment unless one is given."""
    clip_words, t5_words = vocabularies
    return TextPairReader(
        name=spec.name,
        clip=clip,
        t5=t5,
        clip_words=clip_words,
        t5_words=t5_words,
        text_length=spec.text_length,
        translator=translator or translate.from_environment(),
    )


def listed(words: list[str], separator: str, count: int = 20) -> str:
    """The first of some words, and how many more there are."""
    more = f" … and {len(words) - count} more" if len(words) > count else ""
    return separator.join(words[:count]) + more


def _letters(parts: list[str]) -> bool:
    """Whether there is something to translate: signs such as braces, and the ï of naïve, are beyond T5 in any
    language."""
    return any(c.isalpha() and "LATIN" not in unicodedata.name(c, "") for part in parts for c in part)
