"""Photographs keep all that their files hold: every format, depth and oddity, as others read it back."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from fluxloom.edit import tiff
from fluxloom.edit.photo import Photo
from fluxloom.errors import BadInput
from fluxloom.infer import pictures, xmp
from fluxloom.infer.receipt import Receipt, verify

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = xmp.pack("x").replace(b"fluxloom:receipt", b"fluxloom:rating").replace(b"urn:fluxloom:receipt:1", b"urn:them")
SUFFIXES = (".jpg", ".png", ".webp", ".tif")
RECEIPT = Receipt({
    "schema": 1, "fluxloom": "0", "model": {}, "request": {"seed": 1}, "inputs": [], "pixels": "", "warnings": [],
    "versions": {}, "machine": {}, "seconds": 0, "created": "",
})  # fmt: skip


def pixels(width: int = 48, height: int = 32, dtype: type = np.uint8) -> NDArray[np.generic]:
    """Every value at random: nothing survives by luck."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype=dtype)


def exif(orientation: int = 6) -> Image.Exif:
    found = Image.Exif()
    found[0x010F], found[0x0112] = "Maker", orientation
    found.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    found.get_ifd(0x8825)[1] = "N"
    return found


def full(path: Path, orientation: int = 6) -> Path:
    """A file with everything that its format has a place for."""
    picture, notes, all_of = Image.fromarray(pixels()), PngImagePlugin.PngInfo(), exif(orientation)
    options: dict[str, object] = {"icc_profile": ICC, "exif": all_of, "dpi": (300, 300)}
    if path.suffix == ".png":
        notes.add_itxt("XML:com.adobe.xmp", XMP.decode())
        notes.add_text("Author", "Ann")
        options["pnginfo"] = notes
    elif path.suffix == ".tif":
        all_of[700] = XMP
    else:
        options |= {"xmp": XMP, "comment": b"hello"} if path.suffix == ".jpg" else {"xmp": XMP, "lossless": True}
    picture.save(path, **options)
    return path


def seen(path: Path) -> tuple[object, ...]:
    """What Pillow, which wrote none of our files, finds in one."""
    with Image.open(path) as found:
        turned = found.getexif().get(0x0112)
        found.load()
        read = found.getexif()
        deeper = [dict(read.get_ifd(tag)) for tag in (0x8769, 0x8825)]
        info = found.info
        texts = (info.get("comment"), info.get("Author"))
        return info["icc_profile"], xmp.join(info["xmp"], None), read.get(0x010F), deeper, turned, texts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_everything_is_kept(tmp_path: Path, suffix: str) -> None:
    path = full(tmp_path / f"a{suffix}")
    photo = Photo.open(path)
    assert photo.size == (32, 48)
    assert pictures.pixel_hash(photo.flat()) == pictures.pixel_hash(pictures.read(path)[1])
    saved = photo.save(tmp_path / f"b{suffix}", RECEIPT)
    before, after = seen(path), seen(saved.path)
    assert before[4] == 6
    assert after == (*before[:4], 1, before[5])  # turned, and no longer said to lie on its side
    assert verify(saved.path).state == "intact"
    again = Photo.open(saved.path)
    assert again.kept == photo.kept  # to the byte
    assert suffix == ".jpg" or (again.pixels == photo.pixels).all()
    assert verify(again.save(tmp_path / f"c{suffix}").path).state == "none"  # an old receipt does not stay


@pytest.mark.parametrize("to", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats_take_over_what_they_can(tmp_path: Path, suffix: str, to: str) -> None:
    path = full(tmp_path / f"a{suffix}", 1)
    saved = Photo.open(path).converted(to).save(tmp_path / "b", RECEIPT)
    assert seen(saved.path)[:4] == seen(path)[:4]
    if "WEBP" not in (to, Photo.open(path).form):
        with Image.open(saved.path) as found:
            assert found.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_a_jpeg_keeps_its_tables(tmp_path: Path) -> None:
    smooth = Image.fromarray(cv2.resize(pixels(8, 8), (96, 96), interpolation=cv2.INTER_CUBIC))
    smooth.save(tmp_path / "a.jpg", quality=60, subsampling=2)
    photo = Photo.open(tmp_path / "a.jpg")
    kept, other = photo.save(tmp_path / "b.jpg"), photo.save(tmp_path / "c.jpg", quality=80)
    assert kept.identical > 0.6 > other.identical + 0.2
    with Image.open(kept.path) as found, Image.open(tmp_path / "a.jpg") as original:
        assert found.quantization == original.quantization


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_stay(tmp_path: Path, suffix: str, orientation: int) -> None:
    deep = pixels(dtype=np.uint16)
    turn = tiff.Directory("<", {tiff.ORIENTATION: (3, 1, struct.pack("<H", orientation))})
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        path.write_bytes(tiff.picture(deep, turn, {}))
    else:
        data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
        body = b"eXIf" + tiff.write(turn)
        path.write_bytes(
            data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
        )
    photo = Photo.open(path)
    assert photo.pixels.dtype == np.uint16
    assert pictures.pixel_hash(photo.flat()) == pictures.pixel_hash(pictures.read(path)[1])
    again = Photo.open(photo.save(tmp_path / f"b{suffix}", RECEIPT).path)
    assert (again.pixels == photo.pixels).all()
    assert orientation > 1 or (cv2.imread(str(tmp_path / f"b{suffix}"), -1)[..., ::-1] == deep).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_kept_aside(tmp_path: Path, form: str, dtype: type) -> None:
    deep = pixels(dtype=dtype)
    alpha = deep[..., 0].copy()
    alpha[:4], alpha[4:8] = 0, np.iinfo(dtype).max
    Photo(deep, alpha, Photo.open(full(tmp_path / "a.png", 1)).kept, "PNG").converted(form).save(
        tmp_path / "b", RECEIPT
    )
    assert verify(tmp_path / "b").state == "intact"
    photo = Photo.open(tmp_path / "b")
    assert photo.alpha is not None
    if form != "WEBP":
        assert (photo.pixels == deep).all()
        assert (photo.alpha == alpha).all()
    after = np.array(photo.flat())
    after[2:6] = 200
    edited = photo.edited(photo.flat(), Image.fromarray(after))
    assert (edited.pixels[8:] == photo.pixels[8:]).all()  # untouched
    assert abs(np.asarray(edited.flat())[4:6].astype(int) - 200).max() <= 1
    assert edited.alpha is photo.alpha


def test_an_edit_of_deep_pixels_keeps_their_fine_steps(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff.picture(pixels(dtype=np.uint16), tiff.Directory(">"), {}))
    photo = Photo.open(tmp_path / "a.tif")
    before = np.asarray(photo.flat())
    after = before.copy()
    after[:16] = np.clip(before[:16].astype(int) + 9, 0, 255)
    edited = photo.edited(photo.flat(), Image.fromarray(after))
    assert (edited.pixels[16:] == photo.pixels[16:]).all()
    assert (np.asarray(edited.flat()) == after).all()
    assert len(np.unique(edited.pixels[:16] & 255)) > 200


@pytest.mark.parametrize(
    ("mode", "said"), [("L", "grey"), ("1", "grey"), ("P", "its palette"), ("CMYK", "CMYK"), ("I;16", "grey")]
)
def test_other_colours_become_rgb(tmp_path: Path, mode: str, said: str) -> None:
    grey = Image.fromarray(pixels(dtype=np.uint16)[..., 0]) if mode == "I;16" else Image.fromarray(pixels())
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (grey if mode == "I;16" else grey.convert(mode)).save(path)
    photo = Photo.open(path)
    assert photo.notes == (f"{said} has become RGB",)
    assert (photo.pixels.dtype == np.uint16) is (mode == "I;16")
    assert pictures.pixel_hash(photo.flat()) == pictures.pixel_hash(pictures.read(path)[1])
    assert (Photo.open(photo.save(tmp_path / "b").path).pixels == photo.pixels).all()


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    whole = full(tmp_path / "a.jpg").read_bytes()
    gif = io.BytesIO()
    Image.new("RGB", (32, 32)).save(gif, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")])
    deep = cv2.imencode(".png", pixels(dtype=np.uint16))[1].tobytes()
    huge = b"BM" + struct.pack("<LLLLllHHLLllLL", 54, 0, 54, 40, 20_000, 10_000, 1, 24, 0, 0, 0, 0, 0, 0)
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    bad = {
        "Truncated File": whole[: len(whole) // 2], "cannot be read": deep[:999],
        "cannot identify": b"hello",
        "cannot identify image": b"", "2 frames": gif.getvalue(), "1x1 pixels": small.getvalue(), "pixels": huge,
    }  # fmt: skip
    for said, data in bad.items():
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(BadInput, match=said):
            Photo.open(tmp_path / "b.png")
    with pytest.raises(BadInput, match="does not exist"):
        Photo.open(tmp_path / "none.png")


def test_damaged_notes_do_not_matter(tmp_path: Path) -> None:
    picture = Image.fromarray(pixels())
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", xmp=b"junk", icc_profile=b"short")
    photo = Photo.open(tmp_path / "a.jpg")
    saved = photo.save(tmp_path / "b.jpg", RECEIPT)
    assert Photo.open(saved.path).kept.exif == photo.kept.exif
    assert "its XMP is damaged or leaves no room: the receipt is left out" in saved.notes
    photo.converted("TIFF").save(tmp_path / "b.tif")
    picture.save(tmp_path / "big.tif", big_tiff=True, icc_profile=ICC)
    big = Photo.open(tmp_path / "big.tif")
    assert (big.kept.icc, len(big.notes)) == (ICC, 1)
    assert "BigTIFF" in big.notes[0]
