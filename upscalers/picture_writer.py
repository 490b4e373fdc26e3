"""Picture files, written: PNG and TIFF row by row as the rows come, the other formats by Pillow when all are there.

Rows are (h, W, C) arrays of uint8 or uint16. Files are read in `picture_reader`; that they appear whole or not at all
is up to the caller (`files.atomic_path`).
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, features

from diptych.errors import ImageError

from .files import check_space
from .pictures import EXIF_IFD, TEXT_TAGS, Metadata, array_to_pil, library

logger = logging.getLogger(__name__)

_WAITING = EXIF_IFD + 1
_EIGHT_BITS = np.dtype(np.uint8)


@dataclass(frozen=True)
class Format:
    """What a picture file can hold."""

    name: str
    """As Pillow names it."""
    suffixes: tuple[str, ...]
    largest: int
    """Pixels along one side."""
    alpha: bool = True
    sixteen_bits: bool = False
    animation: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    """Of Pillow's `save`."""

    def dtype(self, source: np.dtype) -> np.dtype:
        """What a picture of `source` is written as: 16 bits if it has more than 8 and they fit in."""
        return np.dtype(np.uint8 if source == np.uint8 or not self.sixteen_bits else np.uint16)


FORMATS = (
    Format("PNG", (".png",), 2**31 - 1, sixteen_bits=True, animation=True),
    Format("TIFF", (".tif", ".tiff"), 2**31 - 1, sixteen_bits=True),
    Format("JPEG", (".jpg", ".jpeg"), 65500, alpha=False, options=(("quality", 95), ("subsampling", 0))),
    Format("WEBP", (".webp",), 16383, animation=True, options=(("quality", 95), ("method", 4))),
    Format("AVIF", (".avif",), 65536, animation=True, options=(("quality", 90),)),
    Format("BMP", (".bmp",), 2**31 - 1, alpha=False),
    Format("GIF", (".gif",), 65535, animation=True),
)


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format that the suffix of `path` names. Raises ImageError for one that is not written here."""
    suffix = Path(path).suffix.lower()
    for known in FORMATS:
        if suffix in known.suffixes:
            if known.name == "AVIF" and not features.check("avif"):
                raise ImageError(f"{path} cannot be written: this Pillow has no AVIF, take .png or .webp")
            return known
    names = ", ".join(known.suffixes[0] for known in FORMATS)
    raise ImageError(f"{path} cannot be written: the name of a picture ends in one of {names}")


def check_writable(
    path: str | os.PathLike[str],
    size: tuple[int, int, int],
    dtype: np.dtype = _EIGHT_BITS,
    *,
    frames: int = 1,
    pictures: int = 1,
) -> Format:
    """The format of `path`, before any work is done for it.

    size, dtype: (H, W, C) and kind of what is to be written. frames: of an animation. pictures: how many such files.
    Raises ImageError if the format cannot hold it, or the disk may not. The room is counted as if nothing could be
    compressed, since nothing is known of a picture before it is made.
    """
    known = format_of(path)
    height, width, channels = size
    if max(height, width) > known.largest:
        raise ImageError(
            f"{path} cannot be written: {known.name} holds at most {known.largest} pixels along a side, and this would"
            f" be {width} x {height}; take .png or .tif"
        )
    if frames > 1 and not known.animation:
        raise ImageError(f"{path} cannot be written: {known.name} holds no animation; take .gif, .webp or .png")
    row = width * channels * known.dtype(dtype).itemsize + 1  # a PNG has a byte more in each
    check_space(path, pictures * frames * height * row * 1.001)
    return known


def write_picture(
    path: Path,
    known: Format,
    rows: Iterable[np.ndarray],
    size: tuple[int, int, int],
    dtype: np.dtype,
    metadata: Metadata,
) -> None:
    """Writes a picture of `size` (H, W, C) of uint8 or uint16 whose `rows` come from top to bottom."""
    write: Callable[..., None] = {"PNG": _write_png, "TIFF": _write_tiff}.get(known.name, _write_whole)
    write(path, known, rows, size, dtype, metadata)


# PNG (ISO/IEC 15948). Not pypng, which writes no row filters: with Paeth's, and run lengths instead of the search for
# repetitions, photographs become 40 % smaller in the same time, and as small as with Pillow's default in a third of it.
def _write_png(
    path: Path,
    known: Format,
    rows: Iterable[np.ndarray],
    size: tuple[int, int, int],
    dtype: np.dtype,
    metadata: Metadata,
) -> None:
    height, width, channels = size
    with path.open("wb") as file:

        def chunk(kind: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + kind + data)
            file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))

        file.write(b"\x89PNG\r\n\x1a\n")
        colour_type = {1: 0, 3: 2, 2: 4, 4: 6}[channels]
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, dtype.itemsize * 8, colour_type, 0, 0, 0))
        for kind, data in _png_metadata(metadata):
            chunk(kind, data)
        packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        above = np.zeros((1, width * channels * dtype.itemsize), np.uint8)
        for strip in rows:
            if strip.dtype == np.uint16:
                strip = strip.astype(">u2")
            flat = np.ascontiguousarray(strip).view(np.uint8).reshape(len(strip), -1)
            for first in range(0, len(flat), 64):  # few enough rows to stay in the cache
                some = flat[first : first + 64]
                data = packer.compress(_paeth(np.concatenate([above, some]), channels * dtype.itemsize).data)
                above = some[-1:]
                if data:
                    chunk(b"IDAT", data)
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def _paeth(rows: np.ndarray, step: int) -> np.ndarray:
    """Filter 4 of all rows but the first, with its number in front of each: (n + 1, bytes) -> (n, 1 + bytes) uint8."""
    out = np.empty((len(rows) - 1, rows.shape[1] + 1), np.uint8)
    out[:, 0] = 4
    padded = np.pad(rows, ((0, 0), (step, 0))).astype(np.int16)
    left, above, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    to_left = np.abs(above - corner)
    to_above = np.abs(left - corner)
    to_corner = np.abs(left + above - 2 * corner)
    nearest = np.where(to_above <= to_corner, above, corner)
    nearest = np.where((to_left <= to_above) & (to_left <= to_corner), left, nearest)
    np.subtract(rows[1:], nearest.astype(np.uint8), out=out[:, 1:])
    return out


def _png_metadata(metadata: Metadata) -> Iterator[tuple[bytes, bytes]]:
    if metadata.icc_profile:
        yield b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc_profile)
    if metadata.dpi:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)
        yield b"pHYs", struct.pack(">IIB", min(x, 2**31 - 1), min(y, 2**31 - 1), 1)
    if metadata.exif:
        yield b"eXIf", metadata.exif
    for key, value in metadata.text.items():
        keyword = key.encode("latin-1", "replace")[:79]
        try:
            yield b"tEXt", keyword + b"\0" + value.encode("latin-1")
        except UnicodeEncodeError:
            yield b"iTXt", keyword + b"\0\0\0\0\0" + value.encode("utf-8", "replace")


def _write_tiff(
    path: Path,
    known: Format,
    rows: Iterable[np.ndarray],
    size: tuple[int, int, int],
    dtype: np.dtype,
    metadata: Metadata,
) -> None:
    tifffile = library("tifffile", "tifffile", "writing TIFF")
    height, width, channels = size
    row_bytes = width * channels * dtype.itemsize
    rows_per_strip = min(max((1 << 18) // row_bytes, 1), height)
    big = height * row_bytes > 3 << 30  # offsets of 32 bits reach 4 GiB, and noise does not get smaller

    def packed() -> Iterator[bytes]:
        for strip in _in_strips_of(rows, rows_per_strip):
            difference = strip.copy()
            difference[:, 1:] -= strip[:, :-1]  # horizontal predictor, TIFF 6.0 section 14
            packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
            yield packer.compress(difference.astype(dtype.newbyteorder("<"), copy=False).data) + packer.flush()

    tags, camera = _tiff_tags(metadata)
    tifffile.imwrite(
        path,
        packed(),
        shape=size if channels > 1 else size[:2],
        dtype=dtype,
        byteorder="<",
        bigtiff=big,
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        compression="zlib",
        predictor=True,
        rowsperstrip=rows_per_strip,
        iccprofile=metadata.icc_profile,
        resolution=metadata.dpi,
        resolutionunit="inch" if metadata.dpi else None,
        software=False,
        metadata=None,
        extratags=[*tags, (_WAITING, 4, 1, 0, True)] if camera and not big else tags,
    )
    if camera and not big:  # such a block has addresses of 32 bits
        _append_exif(path, camera)


def _tiff_tags(metadata: Metadata) -> tuple[list[tuple[int, int, int, str, bool]], dict[int, Any]]:
    """What of EXIF are tags of the TIFF itself, as tifffile wants them, and the block of camera data."""
    if not metadata.exif:
        return [], {}
    exif = Image.Exif()
    exif.load(b"Exif\0\0" + metadata.exif)
    texts = [(tag, exif[tag]) for tag in TEXT_TAGS if isinstance(exif.get(tag), str)]
    kept = [(tag, text) for tag, text in texts if text.isascii() and not text.startswith('{"shape"')]  # tifffile's own
    return [(tag, 2, 0, text, True) for tag, text in kept], dict(exif.get_ifd(EXIF_IFD))


def _append_exif(path: Path, camera: dict[int, Any]) -> None:
    """Puts the block of camera data at the end of a TIFF, and its address into the tag that waits for it.

    tifffile writes no EXIF tag of its own; the one that waits has the next number, so that tags stay in order.
    """
    tifffile = library("tifffile", "tifffile", "writing TIFF")
    block = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=EXIF_IFD)
    for tag, value in camera.items():
        block[tag] = value
    with tifffile.TiffFile(path) as tiff:
        entry = tiff.pages.first.tags[_WAITING].offset
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end + end % 2
        file.write(b"\0" * (end % 2) + block.tobytes(start))
        file.seek(entry)
        file.write(struct.pack("<HHII", EXIF_IFD, 4, 1, start))


def _in_strips_of(rows: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The same rows, `count` at a time; the last strip may have fewer."""
    held: np.ndarray | None = None
    for strip in rows:
        held = strip if held is None or not len(held) else np.concatenate([held, strip])
        whole = len(held) // count * count
        for first in range(0, whole, count):
            yield held[first : first + count]
        held = held[whole:]
    if held is not None and len(held):
        yield held


def _write_whole(
    path: Path,
    known: Format,
    rows: Iterable[np.ndarray],
    size: tuple[int, int, int],
    dtype: np.dtype,
    metadata: Metadata,
) -> None:
    array, done = np.empty(size, dtype), 0
    for strip in rows:
        array[done : done + len(strip)] = strip
        done += len(strip)
    if size[2] in (2, 4) and not known.alpha:
        if array[..., -1].min() < np.iinfo(dtype).max:
            raise ImageError(f"{known.name} holds no transparency, and the picture has some; take .png, .webp or .tif")
        array = array[..., :-1]
    image = array_to_pil(array)
    del array  # encoders need memory too
    if image.mode == "LA":  # no format written here has it
        image = image.convert("RGBA")
    image.save(path, known.name, **dict(known.options), **_for_pillow(metadata, known))


def write_animation(
    path: Path, known: Format, frames: Iterable[np.ndarray], durations: list[int], loop: int, metadata: Metadata
) -> None:
    """Writes an animation of `frames` (H, W, 4) uint8. durations: of each, in milliseconds. loop: 0 for ever.

    Pillow's encoders keep all frames in memory until the last one.
    """
    images = iter([Image.fromarray(_seen_or_unseen(array) if known.name == "GIF" else array) for array in frames])
    extra: dict[str, Any] = {} if known.name == "GIF" and loop == 1 else {"loop": loop}
    if known.name == "GIF":
        extra["disposal"] = 2
    first = next(images)
    first.save(
        path,
        known.name,
        save_all=True,
        append_images=list(images),
        duration=durations,
        **extra,
        **dict(known.options),
        **_for_pillow(metadata, known),
    )


def _seen_or_unseen(array: np.ndarray) -> np.ndarray:
    """A GIF knows no half transparent pixels."""
    array = array.copy()
    array[..., 3] = np.where(array[..., 3] < 128, 0, 255)
    return array


def _for_pillow(metadata: Metadata, known: Format) -> dict[str, Any]:
    """`metadata` as arguments of Pillow's `save`."""
    arguments: dict[str, Any] = {}
    if metadata.icc_profile and known.name not in ("BMP", "GIF"):
        arguments["icc_profile"] = metadata.icc_profile
    if metadata.exif and known.name not in ("BMP", "GIF"):
        if known.name == "JPEG" and len(metadata.exif) > 65500:
            logger.warning("an EXIF block of %d bytes does not fit into a JPEG and is left out", len(metadata.exif))
        else:
            arguments["exif"] = b"Exif\0\0" + metadata.exif
    if metadata.dpi and known.name in ("JPEG", "BMP", "PNG"):
        arguments["dpi"] = metadata.dpi
    return arguments
