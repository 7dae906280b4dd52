"""Files to images of 8 bits, and what of them cannot be read."""

import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from timm.data.readers.img_extensions import get_img_extensions

from sret_cli.runtime.errors import DATA, SretError
from sret_cli.runtime.signals import Interrupted

# What `pillow_decodes` lets through for files that cannot be decoded, or are absurdly large.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, tarfile.TarError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


EXTENSIONS = (*get_img_extensions(), ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp")


PNG_DEPTH = 24  # the place of the bits of a sample in the header, PNG specification 11.2.1


def unreadable_error(name: str, error: BaseException) -> SretError:
    """The user's error for an image that cannot be decoded."""
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
    return SretError(f"cannot read {name}: {reason}; mend it", DATA)


def decode_image(found: Any, mode: str) -> Image.Image:
    """An open file, an image or an array as an image of 8 bits of that mode.

    Raises:
        ValueError, OSError and others of `UNREADABLE`: it cannot be decoded, or has more pixels
            than Pillow thinks sane.
    """
    if isinstance(found, np.ndarray):
        return Image.fromarray(found).convert(mode)
    with pillow_decodes():
        if isinstance(found, Image.Image):
            return to_eight_bits(found).convert(mode)
        with found, Image.open(found) as image:
            return to_eight_bits(image).convert(mode)


@contextmanager
def pillow_decodes() -> Iterator[None]:
    """Where Pillow opens and decodes: damage of every kind is among `UNREADABLE`, as are bombs.

    Raises:
        ValueError: one of Pillow's decoders raised what it should not, as some do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (*UNREADABLE, MemoryError, Interrupted):
            raise
        except Exception as error:  # a damaged file can fail its decoder in any way
            raise ValueError(f"Pillow cannot decode it ({type(error).__name__}: {error})") from None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """An image with 16 bits a pixel scaled to 8, where Pillow would clip; others as they are.

    Raises:
        ValueError: its pixels have no known range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.mode == "I" and pixels.max() < 256 and not _has_16_bits(image):
        raise ValueError(
            f"pixels of mode I of at most {pixels.max()} have no known range; convert it to 8 or "
            "16 bits"
        )
    return Image.fromarray((pixels // 257).astype(np.uint8))


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file of an image of mode I, of 32 bits in memory, has 16 bits a pixel."""
    if image.format == "TIFF":
        return bits_per_sample(image, b"") == 16
    return image.format in ("PNG", "PPM")  # whose ranges Pillow knows, and makes 16 bits


def bits_per_sample(image: Image.Image, data: bytes) -> int | None:
    """The bits of a sample as the bytes of a PNG file say, or the tags of a TIFF; else None."""
    if image.format == "PNG":
        return data[PNG_DEPTH]
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, (1,)))
    return None


def is_image(path: str) -> bool:
    """Whether a file is named as the images are that are trained on."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
