"""Diptych: a latent diffusion model and a GAN upscaler, hinged into one pipeline.

Names are resolved when they are first used, so that `import diptych` costs nothing and loads no torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a source checkout the packages lie beside this directory; in a wheel they lie inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "upscalers").is_dir():
    __path__.append(str(_root))

_PUBLIC = {
    "DiptychPipeline": "diptych.pipelines",
    "DiptychImg2ImgPipeline": "diptych.pipelines",
    "DiptychInpaintPipeline": "diptych.pipelines",
    "DiptychXLPipeline": "diptych.pipelines",
    "DiptychXLImg2ImgPipeline": "diptych.pipelines",
    "DiptychXLInpaintPipeline": "diptych.pipelines",
    "Upscaler": "diptych.upscalers",
    "DiptychError": "diptych.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
