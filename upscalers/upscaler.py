"""`Upscaler`: the public face of this package. Loads a network, takes pictures of any kind and gives the same back.

It only connects parts: files of weights (`checkpoints`, `official`), the network made ready (`runner`, `channels`),
kinds of picture (`pictures`, `picture_files`), and the engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from diptych.errors import CheckpointError, ImageError, ModelNotFound, OutOfMemory, UnknownArchitecture

from . import official
from .channels import VisibleColours, for_any_channels
from .checkpoints import blend_denoise, load_network_file, read_state_dict
from .device import is_out_of_memory
from .engine import output_size, upscale_rows
from .files import atomic_path
from .networks import Network, load_network
from .passes import Cancel, Model, Progress
from .picture_reader import PictureFile, open_picture
from .picture_writer import check_writable, write_animation, write_picture
from .pictures import array_to_pil, checked_array, checked_tensor, pil_to_array
from .runner import Runner, halo_of, pixels_for
from .sources import ArraySource, Source, TensorSource, tensor_to_array
from .tiles import Border

_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class Upscaler:
    """A network that enlarges pictures by `scale`, and by any other factor with one more resize.

    network: what `load_network_file` gives.
    device: "auto" (None), "cpu", "cuda", "cuda:N", "mps".
    dtype: "auto" (None), "fp32", "fp16", "bf16". The attribute `dtype` says what "auto" has chosen.
    compile: run it with torch.compile: half a minute or more at first, then somewhat faster; ValueError where that
        does not work.
    """

    def __init__(
        self,
        network: Network,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        if network.in_channels != network.out_channels or network.in_channels not in (1, 3):
            raise UnknownArchitecture(
                f"this {network.architecture} makes {network.out_channels} channels of {network.in_channels}:"
                " only networks from grey to grey or from colour to colour can enlarge pictures"
            )
        self.network = network
        self.scale = network.scale
        """Output pixels per input pixel along one side, when `upscale` is not told otherwise."""
        self._runner = Runner(network, device, dtype, compile)
        self._model = Model(
            compute=for_any_channels(self._runner, network.in_channels),
            scale=network.scale,
            halo=halo_of(network),
            multiple=network.multiple,
            device=self._runner.device,
            pixels=pixels_for(network, self._runner.device, self._runner.dtype, compile),
            on_overflow=self._runner.widen,
            modules=self._runner.modules,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        denoise: float | None = None,
        compile: bool = False,
    ) -> Upscaler:
        """Loads a network: an official name (`diptych models list`), a file of weights, or a folder that
        `save_pretrained` or a pipeline wrote; None is the one of the embedded model. An official network is
        downloaded and verified once.

        denoise: 0 (keep noise) to 1 (remove it), for networks with a "wdn" twin (general-x4v3).
        Raises ModelNotFound, CheckpointError, UnknownArchitecture; ValueError for `denoise` where it has no meaning.
        """
        path = official.embedded_model() / "upscaler" if name_or_path is None else official.resolve(name_or_path)
        if path.is_dir():
            if denoise is not None:
                raise ValueError("denoise blends two official networks: it does not apply to a folder")
            network = _load_folder(path)
        else:
            network = load_network_file(path) if denoise is None else _load_blend(name_or_path, path, denoise)
        return cls(network, device=device, dtype=dtype, compile=compile)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision it runs in; fp32 from the moment when half precision overflowed."""
        return self._runner.dtype

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the network in fp32 as config.json and a safetensors file with its own keys, which a pipeline takes as
        its `upscaler` folder and every ESRGAN tool reads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "DiptychUpscaler", "architecture": self.network.architecture}
        weights = {key: weight.contiguous() for key, weight in self.network.module.state_dict().items()}
        with atomic_path(folder / _WEIGHTS) as path:
            save_file(weights, path, metadata={"format": "pt"})
        with atomic_path(folder / _CONFIG) as path:
            path.write_text(json.dumps(config | self.network.hyperparameters, indent=2) + "\n")

    def upscale(
        self,
        picture: Any,
        scale: float | None = None,
        *,
        tile: int | Literal["auto"] = "auto",
        batch: int = 1,
        border: Border = "zero",
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """Enlarges a picture by `scale` (0.1 to 32; None: the network's) and returns the same kind of object.

        picture: a PIL image of any mode; a numpy array (H, W), (H, W, C) or (N, H, W, C) of uint8, uint16 or floats in
            0..1; a tensor (C, H, W) or (N, C, H, W) of floats in 0..1 or uint8, on any device; or a list of these.
            C is 1, 3 or 4: grey, RGB, RGB and alpha. A palette or 1-bit image becomes RGB, RGBA or L.
        tile, batch, border, progress, cancel: see `engine.upscale_rows`.
        Raises ImageError for what is no picture, is empty, or holds NaN; Cancelled, OutOfMemory, ValueError.
        """
        options = _Options(self.scale if scale is None else scale, tile, batch, border, progress, cancel)
        try:
            if isinstance(picture, (list, tuple)):
                return [self._one(each, options.part(index, len(picture))) for index, each in enumerate(picture)]
            return self._one(picture, options)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory("memory ran out for the result: use upscale_file, which needs little") from error
            raise

    def upscale_file(
        self,
        src: str | os.PathLike[str],
        dst: str | os.PathLike[str],
        scale: float | None = None,
        *,
        tile: int | Literal["auto"] = "auto",
        batch: int = 1,
        border: Border = "zero",
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> tuple[int, int]:
        """Enlarges the picture file `src` into the file `dst` and returns the (width, height) of the result.

        The suffix of `dst` names its format. PNG and TIFF are written by rows as they are made: memory is needed for
        the decoded input and one strip, and for PNG and TIFF inputs of more than half a gigabyte for strips only. 16
        bits stay 16 bits where the format has them; alpha, EXIF, ICC profile, dpi, a PNG's text, and the frames,
        durations and repetitions of an animation are kept. The orientation of EXIF is applied.

        The other arguments are those of `upscale`; with border "wrap" the input is decoded whole.
        Raises ImageError, naming the file, for what cannot be read or written, for what the format or the disk of `dst`
        may not hold (before the work), and if both are the same file; OSError; Cancelled, OutOfMemory, ValueError.
        `dst` is replaced when all went well and not touched otherwise.
        """
        src, dst = Path(src), Path(dst)
        options = _Options(self.scale if scale is None else scale, tile, batch, border, progress, cancel)
        try:
            with open_picture(src, any_order=border == "wrap") as picture:
                if dst.exists() and os.path.samefile(src, dst):
                    raise ImageError(f"{dst} is the picture itself: choose another name for the result")
                height, width = output_size(picture.height, picture.width, options.scale)
                size = (height, width, picture.channels)
                known = check_writable(dst, size, picture.dtype, frames=picture.frames)
                with _writing(dst), atomic_path(dst) as path:
                    if picture.source is None:
                        frames = self._frames(picture, options)
                        write_animation(path, known, frames, picture.durations(), picture.loop, picture.metadata)
                    else:
                        dtype = known.dtype(picture.dtype)
                        strips = self._rows(picture.source, picture.channels, options)
                        rows = (tensor_to_array(strip, dtype)[0] for strip in strips)
                        write_picture(path, known, rows, size, dtype, picture.metadata)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(f"memory ran out for {src}: close other programs, or write PNG or TIFF") from error
            raise
        return width, height

    def _frames(self, picture: PictureFile, options: _Options) -> Iterator[np.ndarray]:
        for index, frame in enumerate(picture.animation()):
            yield self._array(frame[None], options.part(index, picture.frames))[0]

    def _one(self, picture: Any, options: _Options) -> Any:
        if isinstance(picture, Image.Image):
            return array_to_pil(self._array(pil_to_array(picture)[None], options)[0], picture)
        if isinstance(picture, np.ndarray):
            dtype, shape = picture.dtype, picture.shape
            array = checked_array(picture)
            out = self._array(array, options)
            out = out if dtype.kind == "u" else out.astype(dtype, copy=False)
            return out[0, ..., 0] if len(shape) == 2 else out[0] if len(shape) == 3 else out
        if isinstance(picture, torch.Tensor):
            batch = checked_tensor(picture)
            height, width = output_size(batch.shape[2], batch.shape[3], options.scale)
            large = torch.empty((*batch.shape[:2], height, width), dtype=picture.dtype, device=picture.device)
            done = 0
            for strip in self._rows(TensorSource(batch), batch.shape[1], options):
                strip = strip.clamp(0, 1) if picture.is_floating_point() else strip.mul(255).round_().clamp_(0, 255)
                large[:, :, done : done + strip.shape[2]] = strip
                done += strip.shape[2]
            return large.reshape(*picture.shape[:-2], height, width)
        raise ValueError(
            f"a picture is a PIL image, a numpy array, a tensor or a list of them, not a {type(picture).__name__}"
        )

    def _array(self, array: np.ndarray, options: _Options) -> np.ndarray:
        """(N, H, W, C) -> the same dtype, enlarged."""
        height, width = output_size(array.shape[1], array.shape[2], options.scale)
        out = np.empty((len(array), height, width, array.shape[3]), array.dtype)
        done = 0
        for strip in self._rows(ArraySource(array), array.shape[3], options):
            out[:, done : done + strip.shape[2]] = tensor_to_array(strip, array.dtype)
            done += strip.shape[2]
        return out

    def _rows(self, source: Source, channels: int, options: _Options) -> Iterator[torch.Tensor]:
        if channels in (2, 4):
            source = VisibleColours(source)
        return upscale_rows(
            self._model,
            source,
            options.scale,
            tile=options.tile,
            batch=options.batch,
            border=options.border,
            progress=options.progress,
            cancel=options.cancel,
        )


@dataclass(frozen=True)
class _Options:
    """What was asked for, besides the picture."""

    scale: float
    tile: int | Literal["auto"]
    batch: int
    border: Border
    progress: Progress | None
    cancel: Cancel | None

    def part(self, index: int, count: int) -> _Options:
        """The same, for one of `count` pictures: its progress is a part of the whole."""
        whole = self.progress
        if whole is None or count == 1:
            return self
        return replace(self, progress=lambda done, total: whole(index * 1000 + done * 1000 // total, count * 1000))


@contextmanager
def _writing(dst: Path) -> Iterator[None]:
    """Gives a failure of the file system the name of the file that was being written."""
    try:
        yield
    except OSError as error:
        raise ImageError(f"{dst} cannot be written: {error.strerror or error}") from error


def _load_folder(folder: Path) -> Network:
    """The network in a folder that `save_pretrained` or a pipeline wrote, or in the `upscaler` folder within it."""
    if not (folder / _CONFIG).is_file() and (folder / "upscaler" / _CONFIG).is_file():
        folder = folder / "upscaler"
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{folder} holds no upscaler: {_CONFIG} and {_WEIGHTS} belong there") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / _CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise CheckpointError(f"{folder / _CONFIG} names no architecture: it is not the configuration of an upscaler")
    known = {key: value for key, value in config.items() if key != "architecture" and not key.startswith("_")}
    weights = read_state_dict(folder / _WEIGHTS)
    try:
        return load_network(weights, **known)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG} does not describe its weights: {error}") from error


def _load_blend(name: str | os.PathLike[str] | None, path: Path, denoise: float) -> Network:
    """`path` is the network that removes noise; its twin comes from the table of official ones."""
    key = official.official_name(Path(path).name)
    twin = official.OFFICIAL[key].wdn if key else None
    if twin is None:
        names = [name for name, entry in official.OFFICIAL.items() if entry.wdn]
        raise ValueError(f"denoise works with {', '.join(names)}, not with {name}")
    beside = path.with_name(official.OFFICIAL[twin].filename)
    wdn = beside if beside.is_file() else official.resolve(twin)
    return load_network(blend_denoise(read_state_dict(path), read_state_dict(wdn), denoise))
