"""From a request to finished pictures: what the command line, the page and the service all call.

Adds to a pipeline what is not diffusers': sizes, Automatic1111's prompt syntax, schedulers by name, LoRAs, previews,
cancelling, and the `parameters` text of every picture. It writes no files.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image

from diptych import __version__
from diptych.errors import Cancelled
from diptych.infotext import Infotext, format_infotext
from diptych.pipelines.encoding import PromptSchedule, encode_prompt
from diptych.pipelines.loras import apply_loras
from diptych.pipelines.preview import LatentPreview
from diptych.pipelines.schedulers import make_scheduler, sampler_name
from diptych.upscalers.pictures import from_tensor

MAX_SEED = 2**32 - 1


class CancelToken(Protocol):
    """`threading.Event` is one."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to draw it. The names are those of the command line, the service and the page.

    Raises ValueError, with a sentence for a person, for a value that makes no sense.
    """

    prompt: str
    """In Automatic1111's syntax: (word:1.2), [from:to:0.5], BREAK, <lora:name:0.8>."""
    negative_prompt: str = ""
    seed: int | None = None
    """0 .. 2**32 - 1; None: drawn at random. The pictures of one request have seed, seed + 1, ..."""
    count: int = 1
    """How many pictures."""
    batch_size: int = 1
    """How many of them are denoised together: faster on a GPU, the same pictures."""
    steps: int = 25
    guidance_scale: float = 7.0
    width: int | None = None
    height: int | None = None
    """Pixels before upscaling. None: the size of init_image, else what the model was made for."""
    upscale: float | None = None
    """How many times the GAN enlarges the picture. None: the upscaler's own scale if no size is given, else 1."""
    scheduler: str | None = None
    """Automatic1111's or diffusers' name; None: the model's own."""
    clip_skip: int = 1
    """1: the last layer of the text encoder, 2: the one before it, ... (as Automatic1111 counts)."""
    init_image: Image.Image | None = None
    strength: float = 0.75
    """0..1: how much of init_image is drawn anew."""
    mask: Image.Image | None = None
    """White is drawn anew, black is kept. Needs init_image."""
    loras: Sequence[tuple[str, float]] = ()
    """Files, or names in the LoRA folder, each with its weight."""
    noise_device: str = "cpu"
    """"cpu": the same noise on every machine. "device": drawn where the model runs."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to draw")
        _in_range("steps", self.steps, 1, 1000)
        _in_range("count", self.count, 1, 10_000)
        _in_range("batch size", self.batch_size, 1, 256)
        _in_range("guidance scale", self.guidance_scale, 0, 100)
        _in_range("clip skip", self.clip_skip, 1, 12)
        _in_range("strength", self.strength, 0, 1)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, MAX_SEED)
        if self.upscale is not None:
            _in_range("upscale", self.upscale, 0.1, 64)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                _in_range(name, side, 8, 16384)
        if self.mask is not None and self.init_image is None:
            raise ValueError("a mask says what of a picture to draw anew: give the picture too (--init)")
        if self.mask is not None and self.init_image is not None and self.mask.size != self.init_image.size:
            raise ValueError(
                f"the mask is {_by(self.mask.size)} and the picture {_by(self.init_image.size)}: make them the same size"
            )
        if self.noise_device not in ("cpu", "device"):
            raise ValueError(f'noise device is {self.noise_device!r}, and must be "cpu" or "device"')


@dataclass(frozen=True)
class GeneratedPicture:
    """A finished picture, and all that is needed to make it again."""

    image: Image.Image
    seed: int
    infotext: str
    """Automatic1111's `parameters` text."""
    settings: dict[str, str]
    """The same, field by field."""
    notes: tuple[str, ...] = ()
    """What was rounded, unknown or repeated, in sentences for a person."""
    seconds: float = 0.0


def generate(
    pipeline: Any,
    request: GenerationRequest,
    *,
    progress: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
    preview: Callable[[list[Image.Image]], None] | None = None,
    preview_every: int = 5,
) -> Iterator[GeneratedPicture]:
    """Draws the pictures of a request one batch after the other and yields each when it is finished.

    `preview` is given a rough picture of every unfinished one, each `preview_every` steps.
    Raises ValueError for what this model cannot do, Cancelled within one step after `cancel` is set, DiptychError.
    """
    raise NotImplementedError


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} is {value:g}, and must be between {low:g} and {high:g}")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
