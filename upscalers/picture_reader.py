"""Picture files, read: what is in them, and their rows.

Pillow decodes. A picture too large to be decoded whole comes by rows where its format allows that, and a TIFF that
Pillow does not know by strips (pypng, tifffile: imported when needed). Files are written in `picture_writer`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diptych.errors import ImageError

from .pictures import Metadata, checked_float, decoding, library, metadata_of, orientation_of, pil_to_array, upright
from .sources import ArraySource, Source, StripSource, array_to_tensor, tensor_to_array

MAX_PIXELS = 1 << 29
"""A picture with more pixels than this (536 million, 24000 x 22369) is taken for a decompression bomb and refused."""

_WHOLE = 1 << 29  # bytes of a decoded picture above which it is read by rows if its format allows it
_STRIP_BYTES = 1 << 22  # decoded bytes that a reader by rows hands out at once, about
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class PictureFile:
    """An open picture file; a context manager that closes it."""

    path: Path
    file: BinaryIO
    height: int
    width: int
    channels: int
    dtype: np.dtype
    """uint8, uint16 or float32."""
    metadata: Metadata
    source: Source | None = None
    """Its pixels, (1, channels, height, width), to be read once from top to bottom; None for an animation."""
    frames: int = 1
    """More than 1 for an animation (GIF, WebP, PNG, AVIF)."""
    image: Image.Image | None = None

    def __enter__(self) -> PictureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def loop(self) -> int:
        """How often an animation is shown; 0: for ever."""
        assert self.image is not None
        loop = self.image.info.get("loop", 1 if self.image.format == "GIF" else 0)
        return loop if isinstance(loop, int) and 0 <= loop < 1 << 16 else 0

    def animation(self) -> Iterator[np.ndarray]:
        """The frames as they appear on the screen, (H, W, 4) uint8."""
        for frame in self._each_frame():
            with _naming(self.path), decoding():
                array = np.array(frame.convert("RGBA"))
            yield array

    def durations(self) -> list[int]:
        """How long each frame is shown, in milliseconds."""
        durations = []
        for frame in self._each_frame():
            with _naming(self.path), decoding():
                frame.load()  # some formats know the duration only then
                duration = float(frame.info.get("duration", 100))
            durations.append(int(duration) if 0 < duration < 1 << 24 else 100)
        return durations

    def _each_frame(self) -> Iterator[Image.Image]:
        assert self.image is not None
        for index in range(self.frames):
            with _naming(self.path), decoding():
                self.image.seek(index)
            yield self.image


def open_picture(path: str | os.PathLike[str], *, any_order: bool = False) -> PictureFile:
    """Opens a picture file and decodes it, unless it is so large that its rows are better decoded one after the other.

    any_order: rows will be asked for again (border "wrap"), so it is decoded whole in any case.
    Raises ImageError, naming the file, for what is no picture, is damaged or empty, or has more than `MAX_PIXELS`;
    OSError for what cannot be opened. Rows that are decoded later raise ImageError when they are asked for.
    """
    path = Path(path)
    file = path.open("rb")
    try:
        with _naming(path):
            return _read(path, file, any_order)
    except BaseException:
        file.close()
        raise


def _read(path: Path, file: BinaryIO, any_order: bool) -> PictureFile:
    magic = file.read(4)
    if not magic:
        raise ImageError("the file is empty")
    try:
        image = _open(file)
    except UnidentifiedImageError as error:
        if magic in _TIFF_MAGIC:
            picture = _tiff_by_rows(path, file, None)
            return _all_of(picture) if any_order else picture
        raise ImageError("it is not a picture, or of a format that Pillow does not know") from error
    _check_size(image.width, image.height)
    with decoding():
        frames = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
    if frames > 1:
        kind, metadata = np.dtype(np.uint8), metadata_of(image)
        return PictureFile(path, file, image.height, image.width, 4, kind, metadata, frames=frames, image=image)
    large = image.width * image.height * len(image.getbands()) > _WHOLE and not any_order and orientation_of(image) == 1
    if image.format == "PNG" and _tiles(image) and _tiles(image)[0][3] == "LA;16B":  # of which Pillow keeps but 8 bits
        picture = _png_by_rows(path, file, metadata_of(image))
        return picture if large else _all_of(picture, orientation_of(image))
    if large and image.format == "PNG" and not image.info.get("interlace"):
        return _png_by_rows(path, file, metadata_of(image))
    if large and image.format == "TIFF":
        return _tiff_by_rows(path, file, metadata_of(image))
    with decoding():
        array = _decoded(image, file)
    height, width, channels = array.shape
    source = ArraySource(array[None])
    return PictureFile(path, file, height, width, channels, array.dtype, metadata_of(image), source)


def _all_of(picture: PictureFile, orientation: int = 1) -> PictureFile:
    """A picture that comes by rows, as one in memory."""
    assert picture.source is not None
    rows = picture.source.rows(0, picture.height)
    array = upright(tensor_to_array(rows, picture.dtype)[0], orientation)
    return replace(picture, height=array.shape[0], width=array.shape[1], source=ArraySource(array[None]))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ImageError(f"{path}: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"it claims to have {width} x {height} pixels, and more than {MAX_PIXELS // 1_000_000} million are refused"
            " as a decompression bomb: cut it into parts"
        )
    if width < 1 or height < 1:
        raise ImageError(f"a picture of {width} x {height} pixels is empty: there is nothing to enlarge")


def _open(file: BinaryIO) -> Image.Image:
    file.seek(0)
    # Pillow's own limit is a global that at first only warns; ours is larger, since large pictures come by rows.
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        except UnidentifiedImageError:
            raise
        except Exception:
            with decoding():
                raise
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decoded(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """(H, W, C), upright. Of 16-bit colour Pillow keeps the high bytes; decoding it again gives the low ones."""
    swapped = _in_other_byte_order(image)
    if swapped is None:
        return pil_to_array(image)
    high = np.array(image)
    again: Any = _open(file)
    again.tile = swapped
    again.load()
    return upright(high.astype(np.uint16) << 8 | np.asarray(again), orientation_of(image))


def _tiles(image: Any) -> list[Any]:
    """How Pillow is going to decode the file: (decoder, box, offset, arguments) each."""
    return list(image.tile)


def _in_other_byte_order(image: Image.Image) -> list[Any] | None:
    """What to decode of a 16-bit RGB or RGBA picture, its byte order swapped; None for other kinds of picture."""
    if image.mode not in ("RGB", "RGBA"):
        return None
    tiles = []
    for tile in _tiles(image):
        args = tile[3]
        rawmode = args[0] if isinstance(args, tuple) else args
        if rawmode not in {f"{image.mode};16{order}" for order in "BLN"}:
            return None
        little = rawmode[-1] == "L" or rawmode[-1] == "N" and sys.byteorder == "little"
        other = rawmode[:-1] + ("B" if little else "L")
        args = (other, *args[1:]) if isinstance(args, tuple) else other
        tiles.append(tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args))
    return tiles or None


def _png_by_rows(path: Path, file: BinaryIO, metadata: Metadata) -> PictureFile:
    png = library("png", "pypng", "a PNG of this size or depth")
    file.seek(0)
    with decoding():
        width, height, rows, info = png.Reader(file=file).asDirect()
    channels, depth = info["planes"], info["bitdepth"]
    dtype = np.dtype(np.uint16 if depth > 8 else np.uint8)
    factor = (2 ** (8 * dtype.itemsize) - 1) / (2**depth - 1)
    together = max(_STRIP_BYTES // (width * channels * dtype.itemsize), 1)

    def strips() -> Iterator[torch.Tensor]:
        for first in range(0, height, together):
            with _naming(path), decoding():
                some = [np.array(next(rows)) for _ in range(first, min(first + together, height))]
                array = np.stack(some).reshape(1, len(some), width, channels)
                array = array.astype(dtype) if factor == 1 else (array * factor).round().astype(dtype)
            yield array_to_tensor(array)

    return PictureFile(path, file, height, width, channels, dtype, metadata, StripSource(strips(), 1, height, width))


def _tiff_by_rows(path: Path, file: BinaryIO, metadata: Metadata | None) -> PictureFile:
    tifffile = library("tifffile", "tifffile", "a TIFF of this size or depth")
    file.seek(0)
    with decoding():
        page = tifffile.TiffFile(file).pages.first
        height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
        _check_size(width, height)
        kind, colour = page.dtype, str(page.photometric.name)
        premultiplied = any(int(sample) == 1 for sample in page.extrasamples)
        if metadata is None:
            profile = page.tags.get("InterColorProfile")
            metadata = Metadata(icc_profile=profile.value if profile else None)
    expected = {"MINISBLACK": (1, 2), "MINISWHITE": (1, 2), "RGB": (3, 4)}.get(colour, ())
    if kind not in (np.uint8, np.uint16, np.float32) or channels not in expected or page.planarconfig != 1:
        raise ImageError(f"a TIFF of {channels} x {kind} as {colour} cannot be read here: save it as 8 or 16 bit RGB")

    def strips() -> Iterator[torch.Tensor]:
        with _naming(path), decoding():
            segments = page.segments(maxworkers=1, buffersize=_STRIP_BYTES)
        done = 0
        while done < height:
            rows: np.ndarray | None = None
            right = 0
            while right < width:  # the tiles of one row of tiles; a strip is as wide as the picture
                with _naming(path), decoding():
                    segment, place, shape = next(segments)
                    if rows is None:
                        rows = np.zeros((1, min(shape[1], height - done), width, channels), kind)
                    left, right = place[3], place[3] + shape[2]
                    if segment is not None:
                        rows[:, :, left:right] = segment[:1, : rows.shape[1], : width - left]
            assert rows is not None
            with _naming(path):
                tensor = array_to_tensor(
                    checked_float(rows) if kind == np.float32 else rows.astype(kind.newbyteorder("="))
                )
            if colour == "MINISWHITE":
                tensor[:, :1] = 1 - tensor[:, :1]
            if premultiplied:
                tensor[:, :-1] = (tensor[:, :-1] / tensor[:, -1:].clamp_min(1e-6)).clamp(0, 1)
            yield tensor
            done += rows.shape[1]

    source = StripSource(strips(), 1, height, width)
    return PictureFile(path, file, height, width, channels, kind.newbyteorder("="), metadata, source)
