"""The extension's own section on the Settings page, read whenever work begins.

The values may come from a file that another version wrote, from the API, or not exist at all because the page was never
built (`--nowebui`): each one that makes no sense is replaced by its default.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modules import shared

logger = logging.getLogger(__name__)

SECTION = ("diptych", "Diptych")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
BORDERS = ("zero", "reflect", "wrap")


@dataclass(frozen=True)
class Settings:
    """What the Settings page holds, with its defaults."""

    tile: int = 0
    """Side of a tile in pixels of the input; 0: what suits the device and its memory."""
    batch: int = 1
    """Tiles that go through the network at once."""
    precision: str = "auto"
    border: str = "zero"
    compile: bool = False
    folder: str = ""
    """Where networks lie and downloads go; empty: `models/Diptych` of the host."""
    prefix: str = "Diptych "

    @property
    def folder_path(self) -> Path:
        """The folder of networks, whether it exists or not."""
        return Path(self.folder) if self.folder else Path(shared.models_path) / "Diptych"


_told: set[tuple[str, str]] = set()  # settings are read often, and saying it once is enough
_ALLOWED = {
    "tile": lambda value: value == 0 or 16 <= value <= 16384,
    "batch": lambda value: 1 <= value <= 64,
    "precision": PRECISIONS.__contains__,
    "border": BORDERS.__contains__,
}


def read() -> Settings:
    """The settings of this moment."""
    return Settings(**{field.name: _read(field.name, field.default) for field in fields(Settings)})


def _read(name: str, default: Any) -> Any:
    value = getattr(shared.opts, f"diptych_{name}", default)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)  # number fields of the page give floats
    if type(value) is type(default) and _ALLOWED.get(name, lambda _: True)(value):
        return value
    if (name, repr(value)) not in _told:
        _told.add((name, repr(value)))
        logger.warning("Diptych: the setting %s is %r, which is not possible here: %r is used", name, value, default)
    return default


def add_to_page() -> None:
    """Puts the section on the Settings page."""
    import gradio as gr

    default = Settings()

    def add(name: str, label: str, component: Any, component_args: Any = None, **more: Any) -> Any:
        info = shared.OptionInfo(getattr(default, name), label, component, component_args, section=SECTION, **more)
        shared.opts.add_option(f"diptych_{name}", info)
        return info

    add("tile", "Tile side", gr.Number, {"precision": 0}).info(
        "in pixels of the input, at least 16; 0: what suits the device and its memory. Results do not depend on it"
    )
    add("batch", "Tiles at once", gr.Slider, {"minimum": 1, "maximum": 64, "step": 1}).info(
        "more than 1 is faster with small tiles on a GPU, and takes as much more of its memory"
    )
    add("precision", "Precision", gr.Radio, {"choices": list(PRECISIONS)}).info(
        "auto: half precision where the device is fast and safe in it; --no-half is obeyed on GPUs"
    )
    add("border", "What lies outside the picture", gr.Radio, {"choices": list(BORDERS)}).info(
        "zero: as the network was trained; reflect: mirrored, no dark or bright edges; wrap: for tileable textures"
    )
    add("compile", "Compile networks", gr.Checkbox).info(
        "torch.compile: a network takes a minute longer to load, then pictures take less; needs a C++ compiler"
    )
    add("folder", "Folder of networks and downloads", gr.Textbox, restrict_api=True).info(
        "empty: models/Diptych"
    ).needs_reload_ui()
    add("prefix", "Prefix of names in the upscaler lists", gr.Textbox).needs_reload_ui()
