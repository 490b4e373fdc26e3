"""From a request to finished pictures: what the command line, the page and the service all call.

Adds to a pipeline what is not diffusers': sizes, Automatic1111's prompt syntax, schedulers by name, LoRAs, previews,
cancelling, and the `parameters` text of every picture. Where files lie is the caller's to say.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diptych import __version__
from diptych.errors import CheckpointError
from diptych.infotext import Infotext, format_infotext
from diptych.pipelines.diptych import in_task
from diptych.pipelines.drawing import CancelToken, Refinement, Watch, draw, finish
from diptych.pipelines.encoding import encode_prompts
from diptych.pipelines.latents import LATENT_MODES
from diptych.pipelines.loading import model_name
from diptych.pipelines.loras import apply_loras, find_lora
from diptych.pipelines.masked import MASKED_CONTENT
from diptych.pipelines.prompts import parse_prompt
from diptych.pipelines.schedulers import make_scheduler, sampler_name
from diptych.upscalers.picture_writer import check_writable
from diptych.upscalers.tiles import round_up

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to draw it. The names are those of the command line, the service and the page.

    Raises ValueError, with a sentence for a person, for a value that makes no sense.
    """

    prompt: str
    """In Automatic1111's syntax: (word:1.2), [from:to:0.5], BREAK, <lora:name:0.8>. Empty: whatever comes."""
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
    masked_content: str = "original"
    """What the white part begins from, where strength < 1: "fill", "original", "latent noise", "latent nothing"."""
    refine: float | None = None
    """0..1: how much of the enlarged picture is drawn anew (Automatic1111's hires. fix); None: it stays as it is."""
    refine_steps: int | None = None
    """Denoising steps of that. None: as with init_image, refine * steps."""
    latent_mode: str | None = None
    """One of `latents.LATENT_MODES`: before refining, the latents are enlarged, and not the picture by the GAN."""
    loras: Sequence[tuple[str, float]] = ()
    """Files, or names in the LoRA folder, each with its weight."""
    noise_device: str = "cpu"
    """"cpu": the same noise on every machine. "device": drawn where the model runs."""

    def __post_init__(self) -> None:
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
                f"the mask is {_by(self.mask.size)}, the picture {_by(self.init_image.size)}: make them the same size"
            )
        if self.masked_content not in MASKED_CONTENT:
            raise ValueError(f"masked content is {self.masked_content!r}: choose one of {', '.join(MASKED_CONTENT)}")
        if self.refine is not None:
            if not 0 < self.refine <= 1:
                raise ValueError(f"refine is {self.refine:g}, and must be more than 0 and at most 1")
            if self.mask is not None:
                raise ValueError("refine draws the whole picture anew: it does not go with a mask")
        if self.refine_steps is not None:
            _in_range("refine steps", self.refine_steps, 1, 1000)
        if self.latent_mode is not None and (self.refine is None or self.latent_mode not in LATENT_MODES):
            raise ValueError(f"latent mode goes with refine and is one of {', '.join(LATENT_MODES)}")
        if self.noise_device not in ("cpu", "device"):
            raise ValueError(f'noise device is {self.noise_device!r}, and must be "cpu" or "device"')


@dataclass(frozen=True)
class GeneratedPicture:
    """A finished picture, and all that is needed to make it again."""

    image: Image.Image
    """Of a picture that was written to `path`: that file, opened; its pixels are read when they are needed."""
    seed: int
    infotext: str
    """Automatic1111's `parameters` text."""
    settings: dict[str, str]
    """The same, field by field."""
    notes: tuple[str, ...] = ()
    """What was rounded, unknown or repeated, in sentences for a person."""
    seconds: float = 0.0
    path: Path | None = None
    """The file that the picture was written to, if one was named."""


def generate(
    pipeline: Any,
    request: GenerationRequest,
    *,
    progress: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
    preview: Callable[[list[Image.Image]], None] | None = None,
    preview_every: int = 5,
    file_for: Callable[[int], Path] | None = None,
) -> Iterator[GeneratedPicture]:
    """Draws the pictures of a request one batch after the other and yields each when it is finished.

    `preview` is given a rough picture of every unfinished one, each `preview_every` steps.
    `file_for(seed)`, asked before the drawing, names the PNG of each picture. It is then written row by row as the rows
    are decoded and enlarged, and the finished picture is nowhere whole in memory.
    Raises ValueError for what this model cannot do, ImageError for a file that cannot be written or may not fit its
    disk, Cancelled within one step after `cancel` is set, DiptychError.
    """
    pipeline, notes = _with_task(pipeline, request), []
    prompt, negative = parse_prompt(request.prompt), parse_prompt(request.negative_prompt)
    plan = plan_sizes(pipeline, request)
    notes += plan.notes + unknown_words(pipeline, request.prompt)
    steps = request.steps if request.init_image is None else int(request.steps * request.strength)
    if steps < 1:
        raise ValueError(f"strength {request.strength:g} of {request.steps} steps leaves no step to take: raise one")
    native_scheduler = pipeline.scheduler
    apply_loras(pipeline, [*request.loras, *((find_lora(name), weight) for name, weight in prompt.loras)])
    encoded = encode_prompts(pipeline, prompt, negative, steps, request.clip_skip)
    if encoded.chunks > 1:
        notes.append(f"the prompt is long ({encoded.tokens} tokens): it is read in {encoded.chunks} pieces")
    first_seed = random.randint(0, MAX_SEED) if request.seed is None else request.seed
    seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(request.count)]
    batches = [seeds[i : i + request.batch_size] for i in range(0, len(seeds), request.batch_size)]
    again = Refinement(pipeline, request, plan, encoded.steps[-1]) if plan.refined else None
    watch = Watch(pipeline, encoded, progress, cancel, preview, preview_every, steps, again, len(batches), plan)
    try:
        for number, batch in enumerate(batches):
            started = time.perf_counter()
            if request.scheduler is not None:
                # A new one each time: some of them keep what the last picture left in them.
                pipeline.scheduler, said = make_scheduler(request.scheduler, native_scheduler.config)
                notes += [note for note in said if note not in notes]
            files = [None if file_for is None else file_for(seed) for seed in batch]
            for file in files[:1]:
                if file is not None:
                    width, height = plan.final
                    check_writable(file, (height, width, 3), pictures=len(batch))
            watch.begin(number, len(batch))
            drawn = draw(pipeline, request, plan, encoded.steps[0], batch, watch)
            if again is not None:
                drawn = again.draw(drawn, batch, watch, cancel)
            shared = (time.perf_counter() - started) / len(batch)
            for index, (seed, file) in enumerate(zip(batch, files, strict=True)):
                started = time.perf_counter()
                settings = _settings(pipeline, request, plan, again, seed)
                text = format_infotext(Infotext(request.prompt.strip(), request.negative_prompt.strip(), settings))
                one = drawn[index : index + 1]
                image = finish(pipeline, request, plan, one, file, text, watch.finishing(index), cancel)
                seconds = shared + time.perf_counter() - started
                told = (*notes, *pipeline.notes)
                yield GeneratedPicture(image, seed, text, settings, told, seconds, file)
            watch.end()
    finally:
        pipeline.scheduler = native_scheduler
        pipeline.maybe_free_model_hooks()


@dataclass(frozen=True)
class Sizes:
    """The sizes of one request, each (width, height)."""

    asked: tuple[int, int]
    """The picture before upscaling."""
    denoised: tuple[int, int]
    """What the diffusion model draws."""
    final: tuple[int, int]
    factor: float
    """How many times the GAN enlarges what was drawn."""
    refined: tuple[int, int] | None = None
    """What is drawn anew after that, if anything: the final size and what is missing to multiples."""
    notes: list[str] = field(default_factory=list)


def plan_sizes(pipeline: Any, request: GenerationRequest) -> Sizes:
    """Decides what the diffusion model draws and what the GAN makes of it.

    Without an upscaler the model draws the size that was asked for. With one, a picture of more than one and a half
    times the area that the model was made for is drawn in that area, with the same aspect, and enlarged.
    Raises ValueError if upscaling is asked for and there is no upscaler.
    """
    network = None if pipeline.upscaler is None else pipeline.upscaler.network
    if request.upscale not in (None, 1) and network is None and request.latent_mode is None:
        raise ValueError("this model has no upscaler: name one with --upscaler, or leave --upscale out")
    native = _native_size(pipeline)
    width, height = request.width, request.height
    free = width is None and height is None and request.init_image is None
    if request.init_image is not None and width is None and height is None:
        width, height = request.init_image.size
    if width is None or height is None:  # the other side as the model likes it
        width, height = width or native[0], height or native[1]
    upscale = request.upscale or (network.scale if network is not None and free else 1)
    unit = math.lcm(8, pipeline.vae_scale_factor)
    area = native[0] * native[1]
    notes = []
    if network is not None and width * height > 1.5 * area:
        shrink = math.sqrt(area / (width * height))
        denoised = (_round_to(width * shrink, unit), _round_to(height * shrink, unit))
    else:
        denoised = (_round_to(width, unit), _round_to(height, unit))
        if denoised != (width, height):
            notes.append(f"the size {width}x{height} was rounded to {_by(denoised)}: sides are multiples of {unit}")
        width, height = denoised
    final = (max(round(width * upscale), 1), max(round(height * upscale), 1))
    refined = None
    if request.refine is not None:
        if final == denoised:
            raise ValueError("refine draws an enlarged picture anew, and nothing is enlarged here: give --upscale")
        pipeline.check_refine(request.refine)
        refined = (round_up(final[0], unit), round_up(final[1], unit))
    grown = refined or final
    factor = 1.0 if grown == denoised else max(grown[0] / denoised[0], grown[1] / denoised[1])
    return Sizes((width, height), denoised, final, factor, refined, notes)


def unknown_words(pipeline: Any, prompt: str) -> list[str]:
    """A note that names the words of `prompt` which the model's `words.json` does not know; none without that file."""
    known = _known_words(str(pipeline.config.get("_name_or_path") or ""))
    if known is None:
        return []
    text = re.sub(r"<[^>]*>|\bBREAK\b", " ", prompt).lower()
    unknown = [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text)) if word not in known]
    if not unknown:
        return []
    words = ", ".join(repr(word) for word in unknown)
    return [f"this model was never shown the word{'s' * (len(unknown) > 1)} {words}"]


@lru_cache(maxsize=8)
def _known_words(folder: str) -> frozenset[str] | None:
    file = Path(folder) / "words.json"
    if not folder or not file.is_file():
        return None
    try:
        return frozenset(word.lower() for word in json.loads(file.read_text(encoding="utf-8"))["words"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{file} is damaged: it should be an object with a list "words"') from error


def _with_task(pipeline: Any, request: GenerationRequest) -> Any:
    """The same components in the pipeline class that the request needs."""
    inpaints = pipeline.unet.config.in_channels == 9
    if inpaints and request.mask is None:
        raise ValueError("this is an inpainting model: give it a picture and a mask (--init and --mask)")
    task = "Inpaint" if request.mask is not None else "Text" if request.init_image is None else "Img2Img"
    return in_task(pipeline, task)


def _settings(
    pipeline: Any, request: GenerationRequest, plan: Sizes, again: Refinement | None, seed: int
) -> dict[str, str]:
    """The picture's settings under Automatic1111's names."""
    sampler, schedule_type = sampler_name(pipeline.scheduler)
    settings = {"Steps": str(request.steps), "Sampler": sampler}
    if schedule_type != "Automatic":
        settings["Schedule type"] = schedule_type
    settings |= {"CFG scale": f"{request.guidance_scale:g}", "Seed": str(seed), "Size": _by(plan.asked)}
    settings["Model"] = model_name(pipeline)
    if request.init_image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.refine is not None:
        first = "Hires denoising strength" if request.init_image is not None else "Denoising strength"
        settings[first] = f"{request.refine:g}"
    if request.mask is not None and request.masked_content != "original":
        settings["Masked content"] = request.masked_content
    if request.clip_skip > 1:
        settings["Clip skip"] = str(request.clip_skip)
    if plan.denoised != plan.asked:
        settings["Denoised size"] = _by(plan.denoised)
    upscale = f"{plan.final[0] / plan.asked[0]:g}"
    if again is not None:
        settings |= {"Hires upscale": upscale, "Hires steps": str(again.steps)}
        settings["Hires upscaler"] = request.latent_mode or pipeline.upscaler.network.architecture
    else:
        if upscale != "1":
            settings["Postprocess upscale by"] = upscale
        if plan.factor != 1:
            settings["Postprocess upscaler"] = pipeline.upscaler.network.architecture
    if request.loras:
        settings["Loras"] = ", ".join(f"{Path(file).stem}: {weight:g}" for file, weight in request.loras)
    drawn_on_cpu = request.noise_device == "cpu" or torch.device(pipeline._execution_device).type == "cpu"
    settings["RNG"] = "CPU" if drawn_on_cpu else "GPU"
    settings["Version"] = f"diptych {__version__}"
    return settings


def _native_size(pipeline: Any) -> tuple[int, int]:
    """(width, height) in pixels of what the model was trained on."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


def _round_to(value: float, unit: int) -> int:
    return max(round(value / unit), 1) * unit


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} is {value:g}, and must be between {low:g} and {high:g}")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
