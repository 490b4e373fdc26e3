"""Runs a network on a picture as the host wants it: its device and precision, its progress, its Interrupt.

The one place where the engine is called. Networks stay loaded while they are in use: the last two.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from modules import devices, shared
from PIL import Image

from diptych.errors import ImageError
from diptych.upscalers.official import cache_folder, download
from diptych.upscalers.upscaler import Upscaler

from . import networks, settings
from .networks import Entry

logger = logging.getLogger(__name__)

_KEPT = 2
_entries: list[Entry] = []
_loaded: OrderedDict[tuple[Any, ...], Upscaler] = OrderedDict()


def look_up() -> list[Entry]:
    """The networks of this host, looked for anew in the folders of the moment."""
    global _entries
    host = [
        getattr(shared.cmd_opts, f"{kind.lower()}_models_path", None) or Path(shared.models_path) / kind
        for kind in ("ESRGAN", "RealESRGAN")
    ]
    _entries = networks.find([settings.read().folder_path, *map(Path, host), cache_folder()])
    return _entries


def entries() -> list[Entry]:
    """The networks of this host, as they were when its lists were made."""
    return _entries or look_up()


def names() -> list[str]:
    """The names of `entries` as the lists show them."""
    prefix = settings.read().prefix
    return [prefix + entry.name for entry in entries()]


def choose(name: str) -> Entry:
    """The network called `name`, with or without the prefix. Raises ModelNotFound with the names there are."""
    return networks.choose(entries(), name, settings.read().prefix)


def upscale(
    image: Image.Image,
    entry: Entry,
    scale: float,
    *,
    denoise: float | None = None,
    border: str | None = None,
    keep_alpha: bool = True,
) -> Image.Image:
    """`image`, enlarged by `scale`: RGBA if it is RGBA and `keep_alpha`, else RGB.

    `denoise` and `border`: None means as the network and the settings have it. Raises Cancelled within one tile after
    Interrupt, and another DiptychError or a ValueError when it cannot be done.
    """
    if not image.width or not image.height:
        raise ImageError(f"a picture of {image.width}x{image.height} pixels cannot be enlarged: the crop left nothing")
    if image.mode != "RGB" and not (image.mode == "RGBA" and keep_alpha):
        image = image.convert("RGB")
    now = settings.read()
    pixels = np.asarray(image)  # without the metadata, by which the engine might turn the picture
    with _progress(f"{entry.name} {image.width}x{image.height} x{scale:g}") as progress, devices.without_autocast():
        network = _network(entry, denoise, now, progress)
        options: dict[str, Any] = {
            "tile": now.tile or "auto",
            "batch": now.batch,
            "border": border or now.border,
        }
        return Image.fromarray(network.upscale(pixels, scale, progress=progress, cancel=_Interrupt(), **options))


class _Interrupt:
    """The host's Interrupt button, as the engine asks for it."""

    def is_set(self) -> bool:
        return bool(shared.state.interrupted)


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """Yields progress(done, total), which shows in the console and in the host's progress text."""
    from tqdm import tqdm  # every host has it

    text = shared.state.textinfo
    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    hidden = not shared.opts.enable_upscale_progressbar
    with tqdm(desc=f"Diptych {what}", total=100, bar_format=shown, disable=hidden) as bar:

        def progress(done: int, total: int) -> None:
            percent = 100 * done // max(total, 1)
            bar.update(percent - bar.n)
            shared.state.textinfo = f"Diptych {what}: {percent} %"

        shared.state.textinfo = f"Diptych {what}"
        try:
            yield progress
        finally:
            shared.state.textinfo = text


def _network(entry: Entry, denoise: float | None, now: settings.Settings, progress: Any) -> Upscaler:
    """The loaded network of `entry` as the host and the settings want it, from memory or from its file."""
    file = entry.file or download(str(entry.official), progress, _Interrupt(), now.folder_path)
    stat = file.stat()
    key = (file, stat.st_mtime_ns, stat.st_size, denoise, str(devices.device_esrgan), _precision(now), now.compile)
    if key not in _loaded:
        while len(_loaded) >= _KEPT:
            _loaded.popitem(last=False)
        _loaded[key] = Upscaler.from_pretrained(
            file, denoise=denoise, device=devices.device_esrgan, dtype=_precision(now), compile=now.compile
        )
    _loaded.move_to_end(key)
    return _loaded[key]


def _precision(now: settings.Settings) -> str:
    """--no-half and --upcast-sampling mean that a GPU's fp16 is not to be trusted; a CPU never computes in fp16."""
    distrusted = shared.cmd_opts.no_half or getattr(shared.cmd_opts, "upcast_sampling", False)
    if now.precision == "auto" and distrusted and devices.device_esrgan.type != "cpu":
        return "fp32"
    return now.precision
