"""Pictures at the border: any file or PIL image as upright 8-bit RGB and back, and the hash of its pixels."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from fluxloom.errors import BadInput

MIN_SIDE = 16  # pixels; smaller pictures say nothing to a model of 16-pixel tokens
MAX_PIXELS = 178_956_970  # half a gigabyte of RGB; where Pillow, too, suspects a decompression bomb

Source = Image.Image | io.BytesIO | str | os.PathLike[str]


def read(source: Source) -> tuple[Image.Image, Image.Image]:
    """A file or PIL image as (the picture as it was found, the same as :func:`upright`).

    Of an animation, the first frame. Raises BadInput for what is missing, unreadable, smaller than 16 pixels on
    a side or larger than 179 megapixels.
    """
    with opened(source) as found:
        found.load()
        return found, upright(found)


def size_of(source: Source) -> tuple[int, int]:
    """Width and height as stored (before any turning), from the head of a file. Raises as :func:`read`."""
    with opened(source) as found:
        return found.size


def upright(picture: Image.Image) -> Image.Image:
    """8-bit RGB, turned as its EXIF orientation says, transparency laid over white; always a copy.

    16-bit grey keeps its upper 8 bits, as Pillow reads 16-bit colours; CMYK is converted by its colour profile where it
    has one.
    """
    picture = turned(picture)
    if picture.mode == "CMYK" and picture.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError):  # a damaged profile: as without
            profile = io.BytesIO(picture.info["icc_profile"])
            rgb = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return rgb or picture.convert("RGB")  # it is None only of what is converted in place
    if picture.mode == "F":
        raise BadInput("got a picture of floating point numbers, allowed 8 or 16 bits a channel, try converting it")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        wide = picture.mode != "I" or int(values.max()) > 255
        grey = values.clip(0, 65535) >> 8 if wide else values.clip(0)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def turned(picture: Image.Image) -> Image.Image:
    """A copy, turned as the EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError):  # the note is damaged, not the picture
        return picture.copy()


def pixel_hash(picture: Image.Image) -> str:
    """``sha256:...`` of the size and the RGB values of a picture."""
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    found = hashlib.sha256(f"RGB {rgb.width}x{rgb.height}\n".encode())
    found.update(rgb.tobytes())
    return f"sha256:{found.hexdigest()}"


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Lanczos, without cropping."""
    size = (width, height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as float32 [1, 3, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return values.float() / 127.5 - 1


def to_picture(x_13HW: Tensor) -> Image.Image:
    """A tensor [1, 3, H, W], about [-1, 1], as an RGB picture; values outside are clipped."""
    values = ((x_13HW[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().cpu().numpy())


@contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """A picture of which only the head is read; whatever is wrong with it from here on is BadInput."""
    name = "a picture" if isinstance(source, (Image.Image, io.BytesIO)) else repr(os.fspath(source))
    with warnings.catch_warnings():
        # Pillow warns of half of what is allowed here, and of damaged notes (EXIF) in undamaged pictures.
        warnings.simplefilter("ignore")
        try:
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as found:
                _check_size(found, name)
                yield found
        except BadInput:
            raise
        except FileNotFoundError as error:
            raise BadInput(f"got {name}, which does not exist, allowed a picture, try another path") from error
        except Image.DecompressionBombError as error:
            raise BadInput(f"got {name}, allowed at most {MAX_PIXELS:,} pixels, try a smaller one") from error
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            raise BadInput(f"got {name}, which cannot be read ({error}), allowed a whole picture, try one") from error


def _check_size(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        raise BadInput(f"got {name} of {width}x{height} pixels, allowed {MIN_SIDE} or more a side, try a larger one")
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"got {name} of {width}x{height} pixels, allowed at most {MAX_PIXELS:,} in all, try a smaller one"
        )
