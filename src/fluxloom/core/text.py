"""What a prompt becomes: token states and one pooled vector.

The 12 B members read T5 states and CLIP's pooled vector. nano has a small tower of its own, trained with it,
for English and Chinese: words, Chinese characters and, inside quotes, single letters (so that signs can be
spelled).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fluxloom.core.specs import TextSpec


@dataclass(frozen=True)
class TextStates:
    """States of the text: tokens [B, L, C] for the stream, pooled [B, C'] for the conditioning vector."""

    tokens: Tensor
    pooled: Tensor


SPECIALS = ("[PAD]", "[CLS]", "[UNK]")
_QUOTED = re.compile(r"[\"“”「『]([^\"“”「」『』]*)[\"“”」』]")
_PIECE = re.compile(r"[A-Z]|[a-z]+|[0-9]|[^\sA-Za-z0-9]")


def split_words(text: str) -> list[str]:
    """Lower-case words, single characters of other scripts and signs; quoted text as upper-case letters."""
    out: list[str] = []
    end = 0
    for match in _QUOTED.finditer(text):
        out += _PIECE.findall(text[end : match.start()].lower())
        out += ['"', *_PIECE.findall(match[1].upper()), '"']
        end = match.end()
    return out + _PIECE.findall(text[end:].lower())


class Tokenizer:
    """Words, and the longest known pieces of words it does not know ("##" marks a continuation)."""

    def __init__(self, vocabulary: Sequence[str], max_length: int) -> None:
        if tuple(vocabulary[: len(SPECIALS)]) != SPECIALS:
            raise ValueError(f"got a vocabulary that begins with {vocabulary[:3]}; need {SPECIALS} first")
        self.index = {piece: i for i, piece in enumerate(vocabulary)}
        self.max_length = max_length
        self._longest = max(map(len, vocabulary))

    def pieces(self, text: str) -> list[str]:
        """All pieces of a text, before padding or cutting."""
        return [piece for word in split_words(text) for piece in self._pieces_of(word)]

    def encode(self, text: str) -> list[int]:
        """Exactly ``max_length`` ids: [CLS], the pieces (cut if too many), [PAD]."""
        ids = [self.index[piece] for piece in ["[CLS]", *self.pieces(text)]][: self.max_length]
        return ids + [self.index["[PAD]"]] * (self.max_length - len(ids))

    def overflow(self, text: str) -> list[str]:
        """The pieces that :meth:`encode` cuts off."""
        return self.pieces(text)[self.max_length - 1 :]

    def unknown(self, text: str) -> list[str]:
        """The words of which a piece is not known, or that are known only letter by letter (two or more; an ``##s``
        alone is a plural): those were never learned."""
        return [word for word in split_words(text) if self._is_unknown(self._pieces_of(word))]

    @staticmethod
    def _is_unknown(pieces: Sequence[str]) -> bool:
        return pieces == ["[UNK]"] or sum(len(piece.removeprefix("##")) == 1 for piece in pieces) > 1

    def _pieces_of(self, word: str) -> list[str]:
        out: list[str] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            limit = min(len(word), start + self._longest)  # without it, cubic in the length of the word
            ends = (end for end in range(limit, start, -1) if mark + word[start:end] in self.index)
            end = next(ends, 0)
            if not end:
                return ["[UNK]"]
            out.append(mark + word[start:end])
            start = end
        return out


class TowerBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (k n d) -> k b n l d", k=3, n=self.heads).unbind(0)
        x = x + self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)"))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TextTower(nn.Module):
    """nano's text encoder: ids [B, L] to states [B, L, C] and pooled [B, C] (the state of [CLS]). Padding is
    attended, as in FLUX."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        self.token = nn.Embedding(spec.vocab_size, spec.width)
        self.position = nn.Parameter(torch.zeros(spec.max_length, spec.width))
        self.blocks = nn.ModuleList(TowerBlock(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, ids_BL: Tensor) -> TextStates:
        x = self.token(ids_BL) + self.position[: ids_BL.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return TextStates(tokens=x, pooled=x[:, 0])
