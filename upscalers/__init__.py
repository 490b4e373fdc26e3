"""GAN upscaling: networks, checkpoints, tiles, engine, trainer.

The public names are resolved when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Upscaler": "upscaler",
    "upscale_tensor": "engine",
    "Network": "networks",
    "load_network": "networks",
    "RRDBNet": "networks",
    "SRVGGNetCompact": "networks",
    "load_network_file": "checkpoints",
    "read_checkpoint": "checkpoints",
    "read_state_dict": "checkpoints",
    "blend_denoise": "checkpoints",
    "OFFICIAL": "official",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
