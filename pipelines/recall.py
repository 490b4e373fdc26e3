"""From the `parameters` text of a picture back to a request that draws it again, also for Automatic1111's pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError

from diptych.errors import ImageError
from diptych.infotext import Infotext, parse_infotext

# Settings that say nothing about how to draw, or that something else says already.
_SILENT = {"Version", "Model", "Model hash", "VAE", "VAE hash", "Hashes", "Lora hashes", "TI hashes", "TI", "User"}
_SILENT |= {"Schedule type", "Denoised size", "Postprocess upscaler"}


def read_infotext(file: str | os.PathLike[str]) -> Infotext:
    """The `parameters` text of a PNG, parsed. Raises ImageError if it cannot be read, or has none that makes sense."""
    try:
        with Image.open(file) as image:
            image.load()  # the text may come after the pixels
            text = image.info.get("parameters")
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ImageError(f"{file} is no picture that can be read") from error
    except FileNotFoundError as error:
        raise ImageError(f"there is no picture {file}") from error
    except OSError as error:
        raise ImageError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(text, str):
        raise ImageError(f"{file} has no `parameters` text inside: only PNGs written by Diptych or Automatic1111 have")
    try:
        return parse_infotext(text)
    except ValueError as error:
        raise ImageError(f"{file}: {error}") from error


def request_fields(info: Infotext) -> tuple[dict[str, Any], list[str]]:
    """Arguments for a `GenerationRequest`, and notes on what they cannot repeat.

    Raises ValueError for a setting whose value is nonsense.
    """
    settings = dict(info.settings)
    fields: dict[str, Any] = {"prompt": info.prompt, "negative_prompt": info.negative_prompt, "upscale": 1.0}
    notes: list[str] = []

    def take(name: str, field: str, convert: Callable[[str], Any]) -> None:
        value = settings.pop(name, None)
        if value is not None:
            try:
                fields[field] = convert(value)
            except ValueError as error:
                raise ValueError(
                    f"the setting {name!r} of the `parameters` text is nonsense: {value[:60]!r}"
                ) from error

    take("Steps", "steps", int)
    take("CFG scale", "guidance_scale", float)
    take("Seed", "seed", int)
    take("Clip skip", "clip_skip", int)
    take("Size", "size", _size)
    fields["width"], fields["height"] = fields.pop("size", (None, None))
    take("Sampler", "scheduler", str)
    kind = settings.get("Schedule type", "Automatic")
    if kind != "Automatic" and "scheduler" in fields:
        fields["scheduler"] += f" {kind}"
    take("Postprocess upscale by", "upscale", float)
    hires = any(name in settings for name in ("Hires upscale", "Hires resize", "Hires upscaler"))
    take("Hires upscale", "upscale", float)
    take("Hires resize", "resize", _size)
    resize = fields.pop("resize", None)
    if resize is not None and fields["width"] and fields["height"]:  # one of its sides may be 0
        fields["upscale"] = max(resize[0] / fields["width"], resize[1] / fields["height"])
    take("Denoising strength", "strength", float)
    if hires:
        # Of a picture that was begun from another one, the strength of the second pass has a name of its own.
        begun = "Hires denoising strength" in settings
        take("Hires denoising strength", "refine", float)
        fields.setdefault("refine", fields.get("strength"))
        if not begun:
            fields.pop("strength", None)
        take("Hires steps", "refine_steps", int)
        if fields["refine"] is not None:  # Automatic1111 leaves the number out where it is that of the first pass
            fields["refine_steps"] = fields.get("refine_steps") or fields.get("steps")
        if not fields["refine"]:
            fields.update(refine=None, refine_steps=None)
        _enlarger(settings.pop("Hires upscaler", None), fields, notes, settings.get("Version", ""))
    if "strength" in fields:
        notes.append("the picture was made from another picture: give that one with --init")
    take("Loras", "loras", _loras)
    if settings.pop("RNG", "GPU") != "CPU":
        fields["noise_device"] = "device"
        notes.append("if its noise was drawn on a GPU, the picture will differ on a CPU")
    unused = [name for name in settings if name not in _SILENT]
    if unused:
        notes.append(f"not used from its settings: {', '.join(unused)}")
    if "seed" not in fields:
        notes.append("it names no seed: a random one is taken")
    return fields, notes


def _enlarger(name: str | None, fields: dict[str, Any], notes: list[str], version: str) -> None:
    from diptych.pipelines.latents import latent_mode  # torch is not to be loaded for other pictures

    if name is None or version.startswith("diptych") and latent_mode(name) is None:
        return
    if latent_mode(name) is not None and fields["refine"] is not None:
        fields["latent_mode"] = latent_mode(name)
        return
    notes.append(f"it was enlarged with {name}: here the model's own upscaler does that; --upscaler names another")


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


def _loras(text: str) -> list[tuple[str, float]]:
    pairs = [entry.rsplit(":", 1) for entry in text.split(",")]
    return [(name.strip(), float(weight)) for name, weight in pairs]
