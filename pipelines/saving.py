"""Finished rows into a picture, as they come: a PIL image, or a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diptych.errors import ImageError
from diptych.upscalers.files import atomic_path
from diptych.upscalers.picture_writer import format_of, write_picture
from diptych.upscalers.pictures import Metadata
from diptych.upscalers.sources import tensor_to_array

_BITS = np.dtype(np.uint8)


def to_pil(strips: Iterable[torch.Tensor], size: tuple[int, int]) -> Image.Image:
    """An image of `size` (width, height) from strips (1, 3, some, width), 0..1. Only a strip of it exists as float."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    done = 0
    for strip in strips:
        rows = tensor_to_array(strip, _BITS)[0]
        pixels[done : done + len(rows)] = rows
        done += len(rows)
    return Image.fromarray(pixels)


def to_file(file: Path, strips: Iterable[torch.Tensor], size: tuple[int, int], parameters: str | None = None) -> None:
    """Writes strips (1, 3, some, width), 0..1, of a picture of `size` (width, height) as they come (PNG and TIFF; the
    other formats when all are there). parameters: the text of that name in a PNG.

    Raises ImageError if the file cannot be written; then there is none.
    """
    width, height = size
    known = format_of(file)
    rows = (tensor_to_array(strip, _BITS)[0] for strip in strips)
    metadata = Metadata(text={} if parameters is None else {"parameters": parameters})
    try:
        with atomic_path(file) as path:
            write_picture(path, known, rows, (height, width, 3), _BITS, metadata)
    except OSError as error:
        raise ImageError(f"{file} cannot be written: {error.strerror or error}") from error
