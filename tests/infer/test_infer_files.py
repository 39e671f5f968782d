"""Files are written whole or not at all, and carry a note that survives."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pico import photo
from PIL import Image, ImageChops

from fluxloom.errors import BadInput, OutputError
from fluxloom.infer import files, xmp
from fluxloom.infer.pictures import pixel_hash

NOTE = '{"prompt":"a \\"sign\\" <& \\u732b >"}'


def reopened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_note_survives(form: str) -> None:
    assert files.note_in(reopened(files.encode(photo(), form, NOTE))) == NOTE
    assert files.note_in(reopened(files.encode(photo(), form))) is None


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_note_does_not_touch_the_pixels(form: str) -> None:
    bare, noted = (reopened(files.encode(photo(), form, note)) for note in (None, NOTE))
    assert pixel_hash(bare) == pixel_hash(noted)


@pytest.mark.parametrize(("form", "quality"), [("PNG", None), ("WEBP", None), ("WEBP", 80), ("JPEG", None)])
def test_what_is_lossless(form: str, quality: int | None) -> None:
    back = reopened(files.encode(photo(), form, quality=quality))
    assert (pixel_hash(back) == pixel_hash(photo())) is (quality is None and form != "JPEG")


def test_jpeg_keeps_colour_resolution() -> None:
    stripes = Image.new("RGB", (64, 64), "red")
    for x in range(0, 64, 2):
        stripes.paste((0, 128, 0), (x, 0, x + 1, 64))
    back = reopened(files.encode(stripes, "JPEG"))
    assert max(high for _, high in ImageChops.difference(back, stripes).getextrema()) < 40  # 4:2:0 would give over 90


def test_quality_makes_smaller_files() -> None:
    sizes = [len(files.encode(photo(), form, quality=q)) for form in ("JPEG", "WEBP") for q in (20, 95)]
    assert sizes[0] < sizes[1]
    assert sizes[2] < sizes[3]


@pytest.mark.parametrize(("form", "quality"), [("PNG", 90), ("JPEG", 0), ("WEBP", 101)])
def test_quality_that_is_refused(form: str, quality: int) -> None:
    with pytest.raises(BadInput, match=f"quality {quality} for {form}"):
        files.encode(photo(), form, quality=quality)


@given(st.text())
def test_xmp_carries_any_ascii_json(text: str) -> None:
    note = ascii(text)
    assert xmp.unpack(xmp.pack(note)) == note


def test_xmp_rewritten_by_other_software() -> None:
    packet = xmp.pack("x").decode()
    rewritten = packet.replace(' fluxloom:receipt="x"/>', "><fluxloom:receipt>x</fluxloom:receipt></rdf:Description>")
    assert rewritten != packet
    assert xmp.unpack(rewritten.encode()) == "x"


@pytest.mark.parametrize(
    "packet",
    [b"", b"<a", b"<a/>", b"\xff\xfe", *(b'<?xml version="1.0" encoding="%b"?><a/>' % e for e in (b"utf-32", b"no"))],
)
def test_foreign_xmp(packet: bytes) -> None:
    assert xmp.unpack(packet) is None


@pytest.mark.parametrize(
    ("name", "form"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("b.c.jpeg", "JPEG"), ("猫.WebP", "WEBP")]
)
def test_format_by_suffix(name: str, form: str) -> None:
    assert files.format_of(name) == form


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt", "", ".png"])
def test_suffix_that_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"allowed \.png"):
        files.format_of(name)


# ---------------------------------------------------------------------------------------------- writing


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    assert files.write(path, b"one") == path
    files.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_written_files_have_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    mode = files.write(tmp_path / "a.bin", b"one").stat().st_mode
    assert mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", ["file/a.png", "folder", "x" * 300 + ".png"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="to write to"):
        files.write(tmp_path / name, b"data")
    assert sorted(tmp_path.iterdir()) == before


def test_anything_that_interrupts_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        files.write(tmp_path / "a.png", "not bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from fluxloom.errors import OutputError
from fluxloom.infer.files import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails as on a full disk, in its middle
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(sys.argv[1], bytes(200_000))
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_write_that_fails_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "too large" in ran.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ others' files

THEIRS = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><r:Description r:about="uuid:3"/></r:RDF>'
    b'</x:xmpmeta>    <?xpacket end="w"?>'
)


@given(st.text(), st.text())
def test_a_note_beside_the_xmp_of_others(first: str, second: str) -> None:
    joined = xmp.join(xmp.join(THEIRS, ascii(first)), ascii(second))
    assert joined is not None
    assert xmp.unpack(joined) == ascii(second)
    assert joined.count(b"fluxloom:receipt=") == 1
    assert xmp.join(joined, None) == THEIRS


def test_xmp_that_holds_nothing_or_cannot_be_added_to() -> None:
    assert xmp.join(None, None) is None
    assert xmp.join(None, "x") == xmp.join(xmp.pack("y"), "x") == xmp.pack("x")
    assert xmp.join(xmp.pack("y"), None) is None
    for packet in (b"junk", b"<a/>", b"<RDF/>"):
        assert xmp.join(packet, "x") == packet


def test_tables_of_another_jpeg() -> None:
    once = reopened(files.encode(photo(), "JPEG", quality=40))
    tables = files.tables_of(once)
    again = files.through(once, "JPEG", tables)
    assert again.quantization == once.quantization  # type: ignore[attr-defined]
    assert files.tables_of(reopened(files.encode(photo(), "PNG"))) is None
    assert files.tables_of(reopened(files.encode(photo(), "JPEG")).convert("L")) is None


@pytest.mark.parametrize(
    "tables", [{}, {"qtables": [[0] * 64], "subsampling": 0}, {"qtables": [[1]], "subsampling": 0}]
)
def test_tables_that_are_none(tables: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="got tables for JPEG"):
        files.encode(photo(), "JPEG", quality=tables)
