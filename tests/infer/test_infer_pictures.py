"""Anything that is a picture becomes upright RGB; anything else is refused in one sentence."""

from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico import photo
from PIL import Image, ImageCms

from fluxloom.errors import BadInput
from fluxloom.infer import pictures
from fluxloom.infer.pictures import pixel_hash, read, resize, to_picture, to_tensor, upright


def png_of_size(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims a size, however absurd."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------------------------------- conversion


def test_rgb_is_taken_as_it_is(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    _, rgb = read(tmp_path / "a.png")
    assert pixel_hash(rgb) == pixel_hash(photo())


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    photo(64, 32).save(tmp_path / "a.png", exif=exif)
    _, rgb = read(tmp_path / "a.png")
    assert rgb.size == (32, 64)
    assert pixel_hash(rgb) == pixel_hash(photo(64, 32).transpose(Image.Transpose.ROTATE_270))
    assert pixel_hash(rgb) != pixel_hash(photo(64, 32).transpose(Image.Transpose.ROTATE_90))


@pytest.mark.parametrize("note", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage", b"x"])
def test_a_damaged_exif_note_does_not_matter(note: bytes) -> None:
    picture = photo()
    picture.info["exif"] = note
    _, rgb = read(picture)
    assert pixel_hash(rgb) == pixel_hash(photo())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 128), (0, 0, 10, 20))
    flat = upright(picture.convert("LA") if mode == "LA" else picture)
    assert flat.getpixel((15, 5)) == (255, 255, 255)
    assert flat.getpixel((5, 5)) == (127, 127, 127)


def test_transparent_palette() -> None:
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, 10, 20))
    picture.info["transparency"] = 0
    flat = upright(picture)
    assert flat.getpixel((5, 5)) == (255, 255, 255)
    assert flat.getpixel((15, 5)) == (0, 0, 255)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]] * 4, np.uint16).repeat(8, 0).repeat(8, 1)
    Image.fromarray(values).save(tmp_path / "deep.png")
    _, rgb = read(tmp_path / "deep.png")
    assert [rgb.getpixel((x, 0))[0] for x in (0, 8, 16, 24)] == [0, 1, 128, 255]


def test_wide_integers() -> None:
    small, large = (Image.fromarray(np.full((20, 20), value, np.int32)) for value in (200, 65535))
    assert upright(small).getpixel((0, 0)) == (200, 200, 200)
    assert upright(large).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode: str) -> None:
    grey = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
    rgb = upright(grey)
    assert rgb.mode == "RGB"
    assert min(rgb.getpixel((3, 3))) >= 253


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    _, rgb = read(tmp_path / "a.gif")
    assert rgb.getpixel((0, 0)) == (255, 0, 0)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.png", None, "does not exist"),
        ("text.png", b"this is no picture", "cannot be read"),
        ("empty.png", b"", "cannot be read"),
        ("cut.png", None, "cannot be read"),
        ("tiny.png", png_of_size(15, 4000), "15x4000 pixels, allowed 16 or more"),
        ("large.png", png_of_size(15_000, 12_000), "at most 178,956,970"),
        ("bomb.png", png_of_size(60_000, 60_000), "at most 178,956,970"),
        ("short.png", png_of_size(64, 64), "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    elif name == "cut.png":
        photo(200, 200).save(path)
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadInput, match=message) as caught:
        read(path)
    assert name in str(caught.value)


def test_the_limit_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as programs do that trust their pictures
    (tmp_path / "large.png").write_bytes(png_of_size(15_000, 12_000))
    with pytest.raises(BadInput, match="15000x12000 pixels, allowed at most 178,956,970"):
        read(tmp_path / "large.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path)


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(BadInput, match="floating point"):
        read(Image.new("F", (20, 20)))


def test_pictures_over_half_the_limit_are_accepted(tmp_path: Path) -> None:
    # Pillow alone would warn from 89 megapixels on, and warnings are errors in these tests.
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    assert (Image.MAX_IMAGE_PIXELS or 0) < 10_000 * 9_000
    _, rgb = read(tmp_path / "large.png")
    assert rgb.size == (10_000, 9_000)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_files_are_bad_input_or_pictures(noise: bytes, start: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.png"
        photo(32, 32).save(path)
        data = bytearray(path.read_bytes())
        data[start : start + len(noise)] = noise
        path.write_bytes(data)
        try:
            _, rgb = read(path)
        except BadInput:
            return
        assert rgb.mode == "RGB"


# ---------------------------------------------------------------------------------------------- values


def test_tensor_round_trip_is_exact() -> None:
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    x = to_tensor(every)
    assert x.shape == (1, 3, 16, 16)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert pixel_hash(to_picture(x)) == pixel_hash(every)


def test_values_outside_are_clipped() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)
    assert [to_picture(x).getpixel((i, 0))[0] for i in range(5)] == [0, 0, 128, 255, 255]


def test_channels_are_not_swapped() -> None:
    x = to_tensor(Image.new("RGB", (16, 16), (255, 0, 0)))
    assert x[0, :, 0, 0].tolist() == [1, -1, -1]


def test_hash_knows_the_shape() -> None:
    wide, high = Image.new("RGB", (32, 16)), Image.new("RGB", (16, 32))
    assert wide.tobytes() == high.tobytes()
    assert pixel_hash(wide) != pixel_hash(high)
    assert pixel_hash(wide.convert("L")) == pixel_hash(wide)
    assert pictures.MIN_SIDE == 16


def test_resize_uses_lanczos_and_leaves_what_fits() -> None:
    picture = photo(64, 48)
    assert resize(picture, 64, 48) is picture
    lanczos = picture.resize((32, 32), Image.Resampling.LANCZOS)
    assert pixel_hash(resize(picture, 32, 32)) == pixel_hash(lanczos)
    assert pixel_hash(lanczos) != pixel_hash(picture.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("profile", [b"damaged", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_cmyk_with_a_profile_that_is_not_of_it(profile: bytes) -> None:
    picture = photo().convert("CMYK")
    plain = upright(picture)
    picture.info["icc_profile"] = profile
    assert pixel_hash(upright(picture)) == pixel_hash(plain)
