"""Decodes files to 8-bit images, and recognises those that cannot be read."""

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

# The errors of an image that cannot be decoded or exceeds Pillow's limit of pixels.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
EXTENSIONS = (*get_img_extensions(), ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PNG_DEPTH = 24  # the byte of a PNG file that holds the bits per sample, PNG specification 11.2.1


def unreadable_error(name: str, error: BaseException) -> SretError:
    """The user's error for an image that cannot be decoded."""
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
    return SretError(f"cannot read {name}: {reason}; fix or remove it", DATA)


def decode_image(data: Any, mode: str) -> Image.Image:
    """Converts an open file, an image or an array to an 8-bit image of a Pillow mode.

    Raises:
        ValueError, OSError and others of `UNREADABLE`: it cannot be decoded, or has more pixels
            than Pillow's limit.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert(mode)
    with pillow_decodes():
        if isinstance(data, Image.Image):
            return to_eight_bits(data).convert(mode)
        with data, Image.open(data) as image:
            return to_eight_bits(image).convert(mode)


@contextmanager
def pillow_decodes() -> Iterator[None]:
    """Around code that decodes with Pillow: turns every error of an image into `UNREADABLE` ones.

    Pillow's warning of too many pixels becomes an error.

    Raises:
        ValueError: a decoder of Pillow raised some other exception.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (*UNREADABLE, MemoryError, Interrupted):
            raise
        except Exception as error:  # decoders of damaged files can raise anything
            raise ValueError(f"Pillow cannot decode it ({type(error).__name__}: {error})") from None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales an image of 16 bits to 8, which Pillow would clip; returns others unchanged.

    Raises:
        ValueError: the range of its pixels is not known.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.mode == "I" and pixels.max() < 256 and not _has_16_bits(image):
        raise ValueError(
            f"pixels of mode I of at most {pixels.max()} have no known range; convert the image to "
            "8 or 16 bits"
        )
    return Image.fromarray((pixels // 257).astype(np.uint8))


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an image of mode I (32 bits in memory) has 16 bits a pixel in its file."""
    if image.format == "TIFF":
        return bits_per_sample(image, b"") == 16
    return image.format in ("PNG", "PPM")  # whose pixels Pillow scales to 16 bits


def bits_per_sample(image: Image.Image, data: bytes) -> int | None:
    """The bits per sample according to the header of a PNG or TIFF file; None for other files."""
    if image.format == "PNG":
        return data[PNG_DEPTH]
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, (1,)))
    return None


def is_image(path: str) -> bool:
    """Whether a file has an image's extension and is not hidden."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
