"""Builds the two tokenizers of the 12 B members that come with the package, for checkpoints that bring none.

    python -m pip download --no-deps stable-diffusion-cpp-python==0.4.7
    python -m fluxloom.recipes.tokenizers --sdist stable_diffusion_cpp_python-0.4.7.tar.gz

That source archive holds both as arrays of a C header: CLIP's merges (of OpenAI's CLIP, MIT) and T5's tokenizer.json
(of Google's T5, Apache-2.0). What is kept: the merges as JSON, from which the vocabulary follows; and the
tokenizer.json, its vocabulary in two columns, with scores written as the float32 numbers that they are and white space
split off as SentencePiece does it (the array's older form counts a space at the end as a token).
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fluxloom.errors import BadInput
from fluxloom.weights.vocabularies import BUNDLED

HEADER = "vendor/stable-diffusion.cpp/src/tokenizers/vocab/clip_t5.hpp"
ARRAYS = {"clip": "clip_merges_utf8_c_str", "t5": "t5_tokenizer_json_str"}
SPLIT_AS_SENTENCEPIECE = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "WhitespaceSplit"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ],
}


def read_arrays(sdist: Path) -> dict[str, str]:
    """The two texts in the header of a source archive, by the names of ARRAYS. Raises BadInput where it has none."""
    with tarfile.open(sdist) as archive:
        member = next((name for name in archive.getnames() if name.endswith(HEADER)), None)
        file = archive.extractfile(member) if member else None
        if file is None:
            raise BadInput(f"got {sdist} without {HEADER}, allowed the archive named above, try fetching that")
        header = file.read().decode("ascii")
    out = {}
    for name, array in ARRAYS.items():
        body = re.search(rf"\b{array}\[\]\s*=\s*\{{([^}}]*)\}}", header)
        if body is None:
            raise BadInput(f"got {sdist} without the array {array}, allowed the archive named above, try fetching that")
        out[name] = bytes(int(byte, 16) for byte in re.findall(r"0x([0-9a-fA-F]{2})", body[1])).decode("utf-8")
    return out


def clip_document(merges: str) -> list[str]:
    """The merges, one string each ("i n"), without the header line."""
    return [line for line in merges.split("\n") if line and not line.startswith("#version")]


def t5_document(text: str) -> dict[str, Any]:
    """The tokenizer.json, with shorter scores and the white space of SentencePiece. The vocabulary becomes two columns,
    pieces and scores: so it compresses to little more than half."""
    document: dict[str, Any] = json.loads(text)
    pieces, scores = zip(*document["model"]["vocab"], strict=True)
    columns = [pieces, [float(str(np.float32(score))) for score in scores]]
    model = {**document["model"], "vocab": columns}
    return {**document, "model": model, "pre_tokenizer": SPLIT_AS_SENTENCEPIECE, "decoder": None}


def write(path: Path, document: object) -> int:
    """Write JSON, compressed, byte for byte the same at every build; returns the size."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description="build the tokenizers that come with the package")
    parser.add_argument("--sdist", type=Path, required=True, help="source archive of stable-diffusion-cpp-python")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    args = parser.parse_args()
    found = read_arrays(args.sdist)
    for name, document in (("clip", clip_document(found["clip"])), ("t5", t5_document(found["t5"]))):
        path = args.out / f"{name}.json.xz"
        print(f"{path}: {write(path, document):,} bytes")


if __name__ == "__main__":
    main()
