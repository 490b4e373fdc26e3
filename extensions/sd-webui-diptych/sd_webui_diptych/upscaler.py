"""The hosts' form of an upscaler: what Extras, hires. fix, img2img, SD upscale and other extensions choose from."""

from __future__ import annotations

import logging
from typing import Any

from modules import shared
from modules.upscaler import Upscaler, UpscalerData
from PIL import Image

from diptych.errors import Cancelled, ModelNotFound

from . import extras_cache, networks, settings, work

logger = logging.getLogger(__name__)

LARGEST = 32  # what the engine enlarges by at once


class UpscalerDiptych(Upscaler):
    """Every network of `work.entries`, by names that begin with the prefix.

    The host makes one object at each start; an exception in `__init__` would end the host.
    """

    def __init__(self, dirname: str | None = None) -> None:
        self.name = "Diptych"
        self.scalers: list[Any] = []
        super().__init__()
        self._interrupted = False
        self._entries: dict[str | None, networks.Entry] = {}
        try:
            prefix = settings.read().prefix
            for entry in work.look_up():
                path = str(entry.file or entry.official)
                self._entries[path] = entry
                self.scalers.append(UpscalerData(prefix + entry.name, path, self, entry.scale))
        except Exception:
            logger.exception("Diptych has no networks to offer, because looking for them failed")

    def do_upscale(self, img: Image.Image, selected_model: str | None) -> Image.Image:
        """The picture enlarged by `self.scale`; the picture itself when the user pressed Interrupt."""
        if selected_model not in self._entries:
            raise ModelNotFound(f"{selected_model} is no network of Diptych: Reload UI shows those there are")
        if shared.state.interrupted:  # Forge-classic goes on calling
            self._interrupted = True
            return img
        entry, scale = self._entries[selected_model], self.scale
        try:
            while scale > LARGEST:
                img, scale = work.upscale(img, entry, LARGEST), scale / LARGEST
            return work.upscale(img, entry, scale)
        except Cancelled:
            self._interrupted = True
            return img

    def upscale(self, img: Image.Image, scale: float, selected_model: str | None = None) -> Image.Image:
        """As the host does it: each side of the result is a multiple of 8, rounded down."""
        self._interrupted = False
        self.scale = scale
        if 0 < min(img.size) * scale < 8:  # the host would round down to nothing
            result = self.do_upscale(img, selected_model)
        else:
            result = super().upscale(img, scale, selected_model)
        return extras_cache.mark(result, self._interrupted)
