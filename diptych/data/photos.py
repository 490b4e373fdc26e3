"""Photographs and drawings with free licences that train the embedded upscaler, and square crops of any pictures.

The files are not part of Diptych and are needed to train, never to run: some come inside scikit-image's wheel, the
others are in Debian's wallpaper packages, installed or merely unpacked. Which are for training and which are held out
for evaluation is fixed here, by name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data.folders import load_rgb
from diptych.errors import ImageError, ModelNotFound

logger = logging.getLogger(__name__)
SKIMAGE = "scikit-image"


@dataclass(frozen=True)
class Photo:
    """package: where it comes from; path: within that package; licence and author: as stated there."""

    package: str
    path: str
    licence: str
    author: str
    held_out: bool = False

    @property
    def name(self) -> str:
        """`coffee`, `Volna`, ...: the file's own name, or the folder's where Plasma keeps it."""
        parts = Path(self.path).parts
        return parts[parts.index("contents") - 1] if "contents" in parts else Path(self.path).stem


def _skimage(file: str, licence: str, author: str, held_out: bool = False) -> Photo:
    return Photo(SKIMAGE, file, licence, author, held_out)


def _lomiri(release: str, file: str, licence: str, author: str, held_out: bool = False) -> Photo:
    return Photo(f"lomiri-wallpapers-{release}", f"usr/share/backgrounds/{file}", licence, author, held_out)


def _plasma(name: str, file: str, licence: str, author: str, held_out: bool = False) -> Photo:
    path = f"usr/share/wallpapers/{name}/contents/images/{file}"
    return Photo("plasma-workspace-wallpapers", path, licence, author, held_out)


# Licences: the docstrings of skimage.data; debian/copyright of the lomiri packages; metadata.json beside each Plasma
# picture (its Debian package calls the collection GPL-2+ as a whole).
PHOTOS: tuple[Photo, ...] = (
    _skimage("astronaut.png", "public domain", "NASA"),
    _skimage("brick.png", "CC0-1.0", "CC0Textures"),
    _skimage("camera.png", "CC0-1.0", "Lav Varshney"),
    _skimage("chelsea.png", "CC0-1.0", "Stefan van der Walt", held_out=True),
    _skimage("coffee.png", "CC0-1.0", "Rachel Michetti", held_out=True),
    _skimage("grass.png", "CC0-1.0", "linolafett"),
    _skimage("gravel.png", "CC0-1.0", "CC0Textures"),
    _skimage("hubble_deep_field.jpg", "public domain", "NASA"),
    _skimage("rocket.jpg", "public domain", "SpaceX"),
    _lomiri("16.04", "aitzgorri_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    _lomiri("16.04", "Bridge_by_Sander_Klootwijk.jpg", "CC-BY-SA-4.0", "Sander Klootwijk"),
    _lomiri("16.04", "Dragonfly_by_Bolly.jpg", "CC-BY-SA-4.0", "Bolly"),
    _lomiri("16.04", "free_by_Peter_Nerlich.jpg", "CC-BY-SA-4.0", "Peter Nerlich"),
    _lomiri("16.04", "friends_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    _lomiri("16.04", "greentock_by_Peter_Nerlich.jpg", "CC-BY-SA-4.0", "Peter Nerlich"),
    _lomiri("16.04", "life_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi", held_out=True),
    _lomiri("16.04", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    _lomiri("16.04", "Picture_0B_by_freespace.jpg", "CC-BY-4.0", 'Trevor "Freespace"'),
    _lomiri("16.04", "Picture_1A_by_freespace.jpg", "CC-BY-4.0", 'Trevor "Freespace"'),
    _lomiri("16.04", "seeding_by_Clements_Engelhardt.jpg", "CC0-1.0", "Clemens Engelhardt"),
    _lomiri("16.04", "sunset_by_Aitzol_Berasategi.jpg", "CC-BY-4.0", "Aitzol Berasategi"),
    _lomiri("16.04", "Wine_by_Jakkub_Mede.jpg", "CC-BY-4.0", "Jakub Mede", held_out=True),
    _lomiri("20.04", "Kleiber_by_Lukas_Baubkus.jpg", "CC-BY-SA-3.0", "Lukas Baubkus"),
    _plasma("Altai", "5120x2880.png", "CC-BY-SA-4.0", "Alesya Khoteeva"),
    _plasma("Autumn", "2560x1600.jpg", "LGPL-3.0", "RJ Quiralta"),
    _plasma("BytheWater", "2560x1600.jpg", "LGPL-3.0", "Maciej Wiklo"),
    _plasma("ColorfulCups", "2560x1600.jpg", "LGPL-3.0", "Dmitri Popov"),
    _plasma("EveningGlow", "2560x1600.jpg", "LGPL-3.0", "Ian Hex", held_out=True),
    _plasma("FallenLeaf", "2560x1600.jpg", "LGPL-3.0", "Martin Klapetek"),
    _plasma("Flow", "5120x2880.jpg", "CC-BY-SA-4.0", "Sandra Smukaste"),
    _plasma("Grey", "2560x1600.jpg", "LGPL-3.0", "Sigi Sagi"),
    _plasma("OneStandsOut", "2560x1600.jpg", "LGPL-3.0", "Risto Saukonpää", held_out=True),
    _plasma("Path", "2560x1600.jpg", "LGPL-3.0", "Risto Saukonpää"),
    _plasma("SafeLanding", "5120x2880.jpg", "CC-BY-SA-4.0", "Louis Durrant"),
    _plasma("Volna", "5120x2880.jpg", "CC-BY-SA-4.0", "Nikita Babin"),
)


def locate(photo: Photo, root: str | os.PathLike[str] = "/") -> Path | None:
    """The file of `photo`, or None. `root`: where the Debian packages were installed or unpacked (`dpkg-deb -x`)."""
    if photo.package == SKIMAGE:
        spec = find_spec("skimage")
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / "data" / photo.path
    else:
        path = Path(root) / photo.path
    return path if path.is_file() else None


def find_photos(root: str | os.PathLike[str] = "/") -> dict[Photo, Path]:
    """The photographs that are on this machine; the packages that would bring the others are logged.

    Raises ModelNotFound, saying how to get them, if there are none to train on or none that are held out.
    """
    found = {photo: path for photo in PHOTOS if (path := locate(photo, root)) is not None}
    missing = sorted({photo.package for photo in PHOTOS if photo not in found})
    how = (
        f"install {', '.join(missing)} (Debian packages, installed or unpacked below {root} with dpkg-deb -x; "
        "scikit-image with pip)"
    )
    if {photo.held_out for photo in found} != {True, False}:
        raise ModelNotFound(f"The photographs to train the upscaler on are not on this machine: {how}.")
    if missing:
        logger.warning("%d of %d photographs are here; for the others %s", len(found), len(PHOTOS), how)
    return found


@dataclass(frozen=True)
class CropSource:
    """Square crops of pictures at their own resolution, for whoever learns fine detail.

    longest: pictures with a longer side are reduced to it once, which trades camera noise for sharpness.
    """

    paths: tuple[Path, ...]
    longest: int | None = None

    def batch(self, rng: np.random.Generator, number: int, side: int) -> np.ndarray:
        """Crops from anywhere in randomly chosen pictures, turned and mirrored: uint8 (number, side, side, 3)."""
        crops = []
        for index in rng.integers(len(self.paths), size=number):
            picture = _load(self.paths[index], self.longest)
            top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
            crop = np.rot90(picture[top : top + side, left : left + side], int(rng.integers(4)))
            crops.append(crop[:, ::-1] if rng.integers(2) else crop)
        return np.stack(crops)


@lru_cache(maxsize=64)  # decoding a photograph costs more than a training step; 64 of 1440 pixels hold about 270 MB
def _load(path: Path, longest: int | None) -> np.ndarray:
    image = load_rgb(path)
    if longest is not None:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)


def large_enough(paths: Sequence[Path], side: int) -> tuple[Path, ...]:
    """Those pictures whose both sides have `side` pixels; the others are logged and counted. ImageError if none is."""
    large = []
    for path in paths:
        with Image.open(path) as image:
            width, height = image.size
        if min(width, height) >= side:
            large.append(path)
        else:
            logger.warning("%s is skipped: %dx%d is smaller than a patch of %d", path, width, height, side)
    if not large:
        raise ImageError(f"None of the {len(paths)} pictures has {side} x {side} pixels, the size of a training patch.")
    if len(large) < len(paths):
        logger.warning("%d pictures that are too small were skipped, %d are used", len(paths) - len(large), len(large))
    return tuple(large)
