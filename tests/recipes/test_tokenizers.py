"""The recipe of the bundled tokenizers, on a small archive of the same form."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fluxloom.errors import BadInput
from fluxloom.recipes import tokenizers as recipe

MERGES = "#version: 0.2\ni n\nt h\nth e</w>\n"
SCORE = float(np.float32(-2.0122929))
DOCUMENT = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", SCORE]]},
}


def archive(path: Path, arrays: dict[str, str], name: str = f"package-1.0/{recipe.HEADER}") -> Path:
    """A source archive with a C header of byte arrays."""
    text = "".join(
        f"static const unsigned char {array}[] = {{\n{', '.join(f'0x{byte:02x}' for byte in content.encode())}\n}};\n"
        for array, content in arrays.items()
    ).encode()
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(text)
        file.addfile(member, io.BytesIO(text))
    return path


def test_it_builds_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {recipe.ARRAYS["clip"]: MERGES, recipe.ARRAYS["t5"]: json.dumps(DOCUMENT)}
    sdist, out = archive(tmp_path / "sdist.tar.gz", arrays), tmp_path / "out"
    contents = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["tokenizers", "--sdist", str(sdist), "--out", str(out)])
        recipe.main()
        contents.append([(out / f"{name}.json.xz").read_bytes() for name in ("clip", "t5")])
    assert contents[0] == contents[1]  # byte for byte the same
    clip, t5 = (json.loads(lzma.decompress(content)) for content in contents[0])
    assert clip == ["i n", "t h", "th e</w>"]
    pieces, scores = t5["model"]["vocab"]
    assert float(np.float32(scores[3])) == SCORE
    assert len(str(scores[3])) < len(str(SCORE))
    t5["model"]["vocab"] = list(zip(pieces, scores, strict=True))
    assert Tokenizer.from_str(json.dumps(t5)).encode("a  ").ids == [3, 2]  # nothing for the space at the end
    assert "clip.json.xz" in capsys.readouterr().out


def test_archives_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="without vendor/"):
        recipe.read_arrays(archive(tmp_path / "a.tar.gz", {}, "package-1.0/README"))
    with pytest.raises(BadInput, match="without the array t5_tokenizer_json_str"):
        recipe.read_arrays(archive(tmp_path / "b.tar.gz", {recipe.ARRAYS["clip"]: MERGES}))
