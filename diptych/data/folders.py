"""Pictures of a folder, with captions beside them where there are any: what every trainer can read.

`cat.jpg` is captioned by `cat.txt`. A damaged picture is named, skipped and counted when the folder is opened, before
any training time is spent.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from diptych.errors import ImageError

logger = logging.getLogger(__name__)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Picture:
    """A readable picture file and its caption ("" without one)."""

    path: Path
    caption: str


def find_pictures(folder: str | os.PathLike[str]) -> list[Picture]:
    """All readable pictures below `folder`, sorted by path.

    Raises ImageError if the folder cannot be read or holds no readable picture; damaged files are logged one by one and
    counted.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ImageError(f"{root} is not a folder of pictures.")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ImageError(f"The folder {root} cannot be read: permission denied.")
    found, damaged = [], 0
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            damaged += 1
            logger.warning("%s is skipped: %s", path, error)
            continue
        text = path.with_suffix(".txt")
        found.append(Picture(path, text.read_text(encoding="utf-8").strip() if text.is_file() else ""))
    if damaged:
        logger.warning("%d damaged pictures in %s were skipped, %d are used", damaged, root, len(found))
    if not found:
        raise ImageError(f"{root} holds no readable picture ({', '.join(sorted(SUFFIXES))}).")
    return found


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """The picture upright and in RGB, transparency laid on white."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            layer = upright.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return Image.alpha_composite(white, layer).convert("RGB")
        return upright.convert("RGB")


def random_crop(image: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of the picture, scaled so that its shorter side is 1 to 1.5 `side`: uint8 (side, side, 3)."""
    scale = side * float(rng.uniform(1, 1.5)) / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    return np.asarray(resized.crop((left, top, left + side, top + side)))
