"""Prompt to picture: diffusers' Stable Diffusion pipelines with one component more, the GAN `upscaler`.

Names are resolved when they are first used: diffusers takes seconds to import, and not every name needs it.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "DiptychPipeline": "diptych.pipelines.diptych",
    "DiptychImg2ImgPipeline": "diptych.pipelines.diptych",
    "DiptychInpaintPipeline": "diptych.pipelines.diptych",
    "DiptychXLPipeline": "diptych.pipelines.diptych",
    "DiptychXLImg2ImgPipeline": "diptych.pipelines.diptych",
    "DiptychXLInpaintPipeline": "diptych.pipelines.diptych",
    "DiptychUpscaler": "diptych.pipelines.upscaler",
    "GenerationRequest": "diptych.pipelines.generation",
    "GeneratedPicture": "diptych.pipelines.generation",
    "generate": "diptych.pipelines.generation",
    "load_pipeline": "diptych.pipelines.loading",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'diptych.pipelines' has no attribute {name!r}")
