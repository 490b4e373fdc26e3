"""Kinds of picture in memory, and the way between them: PIL images, numpy arrays, tensors.

Everything meets in an array (N, H, W, C) of uint8, uint16 or float32 (0..1) with 1 to 4 channels: grey, grey + alpha,
RGB, RGBA. Files are read and written elsewhere.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from diptych.errors import DiptychError, ImageError

from .sources import array_to_tensor, tensor_to_array

logger = logging.getLogger(__name__)

EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
"""Tags of EXIF's blocks of camera data and of places."""
TEXT_TAGS = (270, 271, 272, 305, 306, 315, 33432)
"""Tags of text: description, make, model, software, date, artist, copyright."""
_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF 2.32, 4.6.4: how a stored picture becomes upright; (H, W, C) -> (H', W', C)
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_PLAIN = ("L", "LA", "RGB", "RGBA")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Metadata:
    """What a picture says about itself and keeps when it grows."""

    icc_profile: bytes | None = None
    exif: bytes | None = None
    """As in a PNG's eXIf chunk, without "Exif" in front; its orientation is 1 or absent."""
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)
    """A PNG's text chunks, among them Automatic1111's `parameters`."""


def library(name: str, package: str, purpose: str) -> Any:
    """A library for files by rows, which a host need not have. Raises ImageError where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImageError(f"{purpose} needs {package}: pip install {package}") from error


def pil_to_array(image: Image.Image) -> np.ndarray:
    """(H, W, C) of uint8, uint16 or float32, upright: an EXIF orientation is applied.

    "1" becomes grey, a palette RGB or RGBA, "F" must lie in 0..1. CMYK is converted to sRGB.
    Raises ImageError for what has no such form, and for a picture that cannot be decoded.
    """
    if 0 in image.size:
        raise ImageError(f"a picture of {image.width} x {image.height} pixels is empty: there is nothing to enlarge")
    with decoding():
        image.load()
        array = _decoded(image)
    return upright(array, orientation_of(image))


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) turned as EXIF `orientation` (1 to 8) says; a view."""
    return _UPRIGHT[orientation](array) if orientation in _UPRIGHT else array


def array_to_pil(array: np.ndarray, like: Image.Image | None = None) -> Image.Image:
    """(H, W, C) -> a PIL image with the metadata of `like` in its `info`.

    The mode is that of the array: L, LA, RGB, RGBA for uint8, I;16 for grey of 16 bits ("I" if `like` is), F for grey
    float. Pillow has no 16-bit or float colour: such arrays are rounded to 8 bits.
    """
    channels = array.shape[2]
    if channels == 1 and array.dtype != np.uint8:
        image = Image.fromarray(np.ascontiguousarray(array[..., 0]))
        if like is not None and like.mode == "I":
            image = Image.fromarray(array[..., 0].astype(np.int32))
    else:
        if array.dtype != np.uint8:
            array = tensor_to_array(array_to_tensor(array[None]), np.dtype(np.uint8))[0]
        image = Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == 1 else array))
    if like is not None:
        metadata = metadata_of(like)
        known = {"icc_profile": metadata.icc_profile, "exif": metadata.exif and b"Exif\0\0" + metadata.exif}
        image.info.update({key: value for key, value in {**known, "dpi": metadata.dpi}.items() if value})
        image.info.update(metadata.text)
    return image


def picture_to_tensor(image: Image.Image) -> torch.Tensor:
    """A PIL image as (1, C, H, W) float32 in 0..1, upright."""
    return array_to_tensor(pil_to_array(image)[None])


def tensor_to_picture(tensor: torch.Tensor, like: Image.Image | None = None) -> Image.Image:
    """(C, H, W) float in 0..1 -> a PIL image of 8 bits, with the metadata of `like`."""
    return array_to_pil(tensor_to_array(tensor.detach()[None].float(), np.dtype(np.uint8))[0], like)


def metadata_of(image: Image.Image) -> Metadata:
    """What an open PIL image carries; what is damaged or cannot be kept is left out."""
    info: dict[Any, Any] = image.info
    icc_profile = info.get("icc_profile")
    if not isinstance(icc_profile, bytes) or image.mode in ("CMYK", "LAB"):  # those become sRGB
        icc_profile = None
    dpi = info.get("dpi")
    try:
        dpi = (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) > 0 else None
    except (TypeError, ValueError, IndexError, ArithmeticError):
        dpi = None
    text = {key: str(value) for key, value in info.items() if image.format == "PNG" and isinstance(value, str)}
    return Metadata(icc_profile or None, _upright_exif(image), dpi, text)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged."""
    exif = _exif_of(image)
    value = 1 if exif is None else exif.get(_ORIENTATION, 1)
    return value if value in _UPRIGHT else 1


def _upright_exif(image: Image.Image) -> bytes | None:
    stored = _exif_of(image)
    if stored is None or not len(stored):
        return None
    raw = image.info.get("exif")
    try:
        if image.format == "TIFF":  # most of whose tags tell of the file, not of the picture
            exif = Image.Exif()
            exif.update({tag: stored[tag] for tag in TEXT_TAGS if tag in stored})
            exif.update({block: dict(stored.get_ifd(block)) for block in (EXIF_IFD, _GPS_IFD) if block in stored})
            return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else None
        if stored.get(_ORIENTATION, 1) == 1 and isinstance(raw, bytes):
            return raw.removeprefix(b"Exif\0\0") or None
        exif = Image.Exif()  # not in `stored`, which belongs to the caller's image
        exif.load(stored.tobytes())
        exif[_ORIENTATION] = 1
        return exif.tobytes().removeprefix(b"Exif\0\0")
    except Exception as error:  # as in `_exif_of`
        logger.warning("the EXIF block is damaged and left out: %s", error)
        return None


def _exif_of(image: Image.Image) -> Image.Exif | None:
    if image.format == "PNG" and "exif" not in image.info:
        return None  # instead of decoding the picture to look for a block behind it
    try:
        exif = image.getexif()
        exif.get(_ORIENTATION)
        return exif
    except Exception:  # whatever Pillow's parser makes of a damaged block: the picture itself is fine
        return None


@contextmanager
def decoding() -> Iterator[None]:
    """A context in which whatever Pillow and its codecs raise over a damaged picture becomes an ImageError."""
    try:
        yield
    except (DiptychError, MemoryError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the picture is damaged or cut off ({reason})") from error


def _decoded(image: Image.Image) -> np.ndarray:
    """(H, W, C) as stored."""
    mode = image.mode
    if mode == "CMYK":
        image = _from_cmyk(image)
    elif mode in ("YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    elif mode == "RGBa" or mode == "PA" or "transparency" in image.info and mode in ("1", "L", "P", "RGB"):
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    elif mode == "1":
        image = image.convert("L")
    elif mode == "P":
        image = image.convert("RGB")
    elif mode == "I":
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ImageError("a picture of 32-bit integers (mode I) must lie in 0..65535: bring it there first")
        return array.astype(np.uint16)[..., None]
    elif mode in _SIXTEEN_BIT:
        return np.asarray(image).astype(np.uint16)[..., None]
    elif mode == "F":
        return checked_float(np.array(image))[..., None]
    elif mode not in _PLAIN:
        raise ImageError(f"a picture of mode {mode} cannot be enlarged: convert it to RGB first")
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return array[..., [0, 3]] if mode in ("1", "L") and array.shape[2] == 4 else array


def checked_array(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (N, H, W, C) -> (N, H, W, C) of uint8, uint16 or float32.

    Raises ImageError for another shape or dtype, for nothing, and for floats that are not in 0..1.
    """
    if array.ndim not in (2, 3, 4):
        raise ImageError(f"an array of shape {array.shape} is no picture: (H, W), (H, W, C) or (N, H, W, C) is")
    batch = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
    _check_shape(batch.shape[1:3], batch.shape[3], len(batch), "(H, W, C)", array.shape)
    if array.dtype not in (np.uint8, np.uint16) and array.dtype.kind != "f":
        raise ImageError(f"an array of {array.dtype} is no picture: use uint8, uint16, or floats in 0..1")
    return checked_float(batch) if array.dtype.kind == "f" else batch


def checked_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """(C, H, W) or (N, C, H, W) of floats or uint8 -> (N, C, H, W) float. Raises ImageError as `checked_array`."""
    if tensor.ndim not in (3, 4):
        raise ImageError(f"a tensor of shape {tuple(tensor.shape)} is no picture: (C, H, W) or (N, C, H, W) is")
    batch = tensor.detach()[None] if tensor.ndim == 3 else tensor.detach()
    _check_shape(batch.shape[2:], batch.shape[1], len(batch), "(C, H, W)", tuple(tensor.shape))
    if batch.dtype == torch.uint8:
        return batch.float().div_(255)
    if not batch.is_floating_point():
        raise ImageError(f"a tensor of {batch.dtype} is no picture: use floats in 0..1 or uint8")
    low, high = batch.float().aminmax()  # torch 2.1 knows none of halves
    _check_range(float(low), float(high))
    return batch


def checked_float(array: np.ndarray) -> np.ndarray:
    """`array` as float32, clipped. Raises ImageError unless all of it is finite and in 0..1 (but for rounding)."""
    _check_range(float(array.min()), float(array.max()))
    return array.astype(np.float32).clip(0, 1)


def _check_shape(size: Sequence[int], channels: int, batch: int, layout: str, shape: tuple[int, ...]) -> None:
    if 0 in size or batch == 0:
        raise ImageError(f"a picture of shape {shape} is empty: there is nothing to enlarge")
    if channels not in (1, 3, 4):
        raise ImageError(
            f"a picture of shape {shape} has {channels} channels: {layout} with 1 (grey), 3 (RGB) or 4 (RGBA) works"
        )


def _check_range(low: float, high: float) -> None:
    if not math.isfinite(low) or not math.isfinite(high):  # one NaN anywhere makes both NaN
        raise ImageError("the picture holds NaN or infinity: something went wrong before it came here")
    if low < -0.01 or high > 1.01:
        raise ImageError(f"a picture of floats must lie in 0..1, this one lies in {low:g}..{high:g}: divide it first")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """To sRGB, by the picture's profile; without one, or with one that cannot be used, as ink on white paper."""
    profile = image.info.get("icc_profile")
    if profile:
        from PIL import ImageCms

        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("the colour profile of a CMYK picture cannot be used (%s): its colours are a guess", error)
        else:
            if converted is not None:
                return converted
    return image.convert("RGB")
