"""Pictures that clients send: from base64 or a file to a `PIL.Image`, within limits. Nothing is ever fetched.

The size is read from the header before a single pixel is decoded, so a bomb costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import ExifTags, Image

from diptych.errors import ImageError
from diptych.webui.settings import Limits

_DATA_URL = re.compile(r"data:[\w./+-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, ArithmeticError, struct.error)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")


def decode_base64(text: str, limits: Limits, what: str = "the picture") -> Image.Image:
    """A picture from base64, with or without a `data:` prefix. Raises ImageError with a sentence about `what`."""
    text = text.strip()
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise ImageError(f"{what} is an address: addresses are never fetched; send the picture itself in base64")
    prefix = _DATA_URL.match(text[:200])
    try:
        data = base64.b64decode(text[prefix.end() :] if prefix else text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{what} is not valid base64 ({error}): encode the whole picture file") from error
    return open_picture(io.BytesIO(data), limits, what)


def decode_many(named: Sequence[tuple[str, str]], limits: Limits) -> list[Image.Image]:
    """Pictures from (what it is, base64). Raises ImageError as `decode_base64` does, and for too many pixels in all."""
    pictures: list[Image.Image] = []
    for what, text in named:
        pictures.append(decode_base64(text, limits, what))
        if sum(picture.width * picture.height for picture in pictures) > limits.request_pixels:
            raise ImageError(
                f"the pictures have more pixels in all than the limit of {limits.request_pixels:,}: send fewer at once"
            )
    return pictures


def open_picture(source: Path | io.BytesIO, limits: Limits, what: str = "the picture") -> Image.Image:
    """A picture, decoded. Raises ImageError if it is none, is damaged, or has more pixels than the limit."""
    picture = open_header(source, limits, what)
    try:
        picture.load()
    except _UNREADABLE as error:
        raise _unreadable(what) from error
    return picture


def open_header(source: Path | io.BytesIO, limits: Limits, what: str = "the picture") -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises ImageError if it is none or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below decides
            picture = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{what} is over the limit of {limits.picture_pixels:,} pixels: scale it down") from error
    except _UNREADABLE as error:
        raise _unreadable(what) from error
    if picture.width * picture.height > limits.picture_pixels:
        raise ImageError(
            f"{what} has {picture.width} x {picture.height} pixels, and at most {limits.picture_pixels:,} are taken: "
            "scale it down"
        )
    return picture


def _unreadable(what: str) -> ImageError:
    return ImageError(f"{what} cannot be read as one of {', '.join(FORMATS)}: is the file whole?")


def read_metadata(picture: Image.Image) -> tuple[str, dict[str, str]]:
    """The `parameters` text of a picture ("" if it has none), and everything else that is written in it, as text.

    PNG says it in text chunks; JPEG and WebP in the EXIF user comment, as Automatic1111 does.
    """
    info = {str(key): value for key, value in picture.info.items()}
    parameters = info.pop("parameters", "")
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not parameters and comment:
        parameters = _user_comment(comment)
    items = {key: _as_text(value) for key, value in info.items() if key not in ("exif", "icc_profile")}
    return _as_text(parameters), items


def _user_comment(comment: bytes | str) -> str:
    if isinstance(comment, str):
        return comment
    charset, text = comment[:8], comment[8:]
    if charset != b"UNICODE\0":
        return (text if charset in (b"ASCII\0\0\0", bytes(8)) else comment).decode("utf-8", "replace")
    return text.decode("utf-16-le" if text[1:2] == b"\0" else "utf-16-be", "replace")


def _as_text(value: object) -> str:
    return value.decode("latin-1", "replace")[:10_000] if isinstance(value, bytes) else str(value)
