"""Registers the extension with the host that loads it, and takes it out of memory when the host reloads scripts."""

from __future__ import annotations

import sys
from pathlib import Path

from modules import script_callbacks

from . import generation, settings

# The class must be known before the host looks for upscalers, and this package keeps it alive on Forge-classic.
from .upscaler import UpscalerDiptych as UpscalerDiptych

_PACKAGES = ("diptych", "sd_webui_diptych")


def register(root: Path) -> None:
    """Adds our callbacks; to be called whenever scripts are loaded. `root`: the directory of the extension."""

    def leave_path() -> None:
        """Forge and Forge-classic keep our root on sys.path, where `webui` and `models` would become everybody's."""
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]

    def before_ui() -> None:
        leave_path()
        generation.add_axes()

    script_callbacks.on_ui_settings(settings.add_to_page)
    script_callbacks.on_before_ui(before_ui)
    script_callbacks.on_app_started(lambda demo, app: leave_path())
    script_callbacks.on_script_unloaded(_forget)


def _forget() -> None:
    """So that "Reload UI" after an update loads the new code, not what is in memory."""
    for name in list(sys.modules):
        if name.partition(".")[0] in _PACKAGES:
            del sys.modules[name]
