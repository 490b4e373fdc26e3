"""From a request to finished pictures: what the command line, the page and the service all call.

Adds to a pipeline what is not diffusers': sizes, Automatic1111's prompt syntax, schedulers by name, LoRAs, previews,
cancelling, and the `parameters` text of every picture. It writes no files.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps

from diptych import __version__
from diptych.errors import Cancelled, CheckpointError
from diptych.infotext import Infotext, format_infotext
from diptych.pipelines.diptych import (
    DiptychImg2ImgPipeline,
    DiptychInpaintPipeline,
    DiptychPipeline,
    DiptychXLImg2ImgPipeline,
    DiptychXLInpaintPipeline,
    DiptychXLPipeline,
)
from diptych.pipelines.encoding import Embeddings, EncodedPrompt, encode_prompts
from diptych.pipelines.loading import model_name
from diptych.pipelines.loras import apply_loras, find_lora
from diptych.pipelines.masked import MASKED_CONTENT
from diptych.pipelines.preview import LatentPreview
from diptych.pipelines.prompts import parse_prompt
from diptych.pipelines.schedulers import make_scheduler, sampler_name

MAX_SEED = 2**32 - 1
_TASKS: dict[tuple[str, bool], Any] = {
    ("Text", False): DiptychPipeline,
    ("Img2Img", False): DiptychImg2ImgPipeline,
    ("Inpaint", False): DiptychInpaintPipeline,
    ("Text", True): DiptychXLPipeline,
    ("Img2Img", True): DiptychXLImg2ImgPipeline,
    ("Inpaint", True): DiptychXLInpaintPipeline,
}


class CancelToken(Protocol):
    """`threading.Event` is one."""

    def is_set(self) -> bool: ...


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
    watch = _Watch(pipeline, encoded, progress, cancel, preview, preview_every, steps, len(batches), plan.denoised)
    try:
        for number, batch in enumerate(batches):
            started = time.perf_counter()
            if request.scheduler is not None:
                # A new one each time: some of them keep what the last picture left in them.
                pipeline.scheduler, said = make_scheduler(request.scheduler, native_scheduler.config)
                notes += [note for note in said if note not in notes]
            watch.begin(number, len(batch))
            pictures = _draw(pipeline, request, plan, encoded.steps[0], batch, watch)
            if plan.factor != 1:
                pictures = pipeline.upscale_pictures(pictures, plan.factor, watch.upscaling, cancel)
            images = pipeline.image_processor.postprocess(
                _centre(pictures, plan.final), output_type="pil", do_denormalize=[False] * len(batch)
            )
            seconds = (time.perf_counter() - started) / len(batch)
            watch.end()
            for seed, image in zip(batch, images, strict=True):
                settings = _settings(pipeline, request, plan, seed)
                text = format_infotext(Infotext(request.prompt.strip(), request.negative_prompt.strip(), settings))
                told = (*notes, *pipeline.notes)
                yield GeneratedPicture(image, seed, text, settings, told, seconds)
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
    notes: list[str] = field(default_factory=list)


def plan_sizes(pipeline: Any, request: GenerationRequest) -> Sizes:
    """Decides what the diffusion model draws and what the GAN makes of it.

    Without an upscaler the model draws the size that was asked for. With one, a picture of more than one and a half
    times the area that the model was made for is drawn in that area, with the same aspect, and enlarged.
    Raises ValueError if upscaling is asked for and there is no upscaler.
    """
    network = None if pipeline.upscaler is None else pipeline.upscaler.network
    if request.upscale not in (None, 1) and network is None:
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
    factor = 1.0 if final == denoised else max(final[0] / denoised[0], final[1] / denoised[1])
    return Sizes((width, height), denoised, final, factor, notes)


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
    is_xl = hasattr(pipeline, "text_encoder_2")
    inpaints = pipeline.unet.config.in_channels == 9
    if inpaints and request.mask is None:
        raise ValueError("this is an inpainting model: give it a picture and a mask (--init and --mask)")
    task = "Inpaint" if request.mask is not None else "Text" if request.init_image is None else "Img2Img"
    cls = _TASKS[task, is_xl]
    if type(pipeline) is cls:
        return pipeline
    kept = ("force_zeros_for_empty_prompt", "requires_aesthetics_score") if is_xl else ("requires_safety_checker",)
    takes = inspect.signature(cls.__init__).parameters
    settings = {name: pipeline.config[name] for name in kept if name in takes and name in pipeline.config}
    other = cls(**pipeline.components, **settings)
    other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    other.set_progress_bar_config(disable=True)
    return other


def _draw(
    pipeline: Any, request: GenerationRequest, plan: Sizes, first: Embeddings, seeds: list[int], watch: _Watch
) -> torch.Tensor:
    """The pictures of one batch before upscaling, (N, 3, H, W), 0..1."""
    arguments: dict[str, Any] = {
        "prompt_embeds": first.prompt,
        "negative_prompt_embeds": first.negative,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "seed": seeds,
        "noise_device": request.noise_device,
        "output_type": "pt",
        "callback_on_step_end": watch.step,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    if first.pooled is not None:
        arguments |= {"pooled_prompt_embeds": first.pooled, "negative_pooled_prompt_embeds": first.negative_pooled}
    width, height = plan.denoised
    if request.init_image is None:
        arguments |= {"width": width, "height": height}
    else:
        arguments |= {"image": _fit(request.init_image, plan.denoised), "strength": request.strength}
    if request.mask is not None:
        mask = ImageOps.fit(request.mask.convert("L"), plan.denoised, Image.Resampling.BILINEAR)
        arguments |= {"mask_image": mask, "width": width, "height": height, "masked_content": request.masked_content}
    pictures = pipeline(**arguments).images
    if request.mask is None or request.init_image is None:
        return pictures
    # The VAE changes every pixel a little: what the mask keeps is taken from the picture itself.
    kept = pipeline.image_processor.pil_to_numpy(_fit(request.init_image, plan.denoised))
    kept = pipeline.image_processor.numpy_to_pt(kept).to(pictures)
    drawn = pipeline.image_processor.numpy_to_pt(pipeline.image_processor.pil_to_numpy(mask)).to(pictures)
    return torch.lerp(kept.expand_as(pictures), pictures, drawn.expand_as(pictures))


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in RGB, enlarged or shrunk to cover `size`, cut around its centre."""
    return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)


class _Watch:
    """Follows the denoising: counts, stops, shows, and changes the prompt between steps."""

    def __init__(
        self,
        pipeline: Any,
        encoded: EncodedPrompt,
        progress: Callable[[int, int], None] | None,
        cancel: CancelToken | None,
        preview: Callable[[list[Image.Image]], None] | None,
        preview_every: int,
        steps: int,
        batches: int,
        size: tuple[int, int],
    ) -> None:
        self._encoded, self._progress, self._cancel, self._preview = encoded, progress, cancel, preview
        self._every, self._steps, self._size = preview_every, steps, size
        self._latent_preview = LatentPreview(pipeline) if preview is not None else None
        # Of each batch, decoding counts as one step, and upscaling as another.
        self._each = steps + 2
        self._total = batches * self._each
        self._before = self._pictures = 0

    def begin(self, number: int, pictures: int) -> None:
        self._before, self._pictures = number * self._each, pictures
        self._check()
        self._tell(0)

    def step(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`."""
        self._check()
        done = min((index + 1) * self._steps // pipeline.num_timesteps, self._steps)  # some samplers take half steps
        self._tell(done)
        if self._preview and self._latent_preview and done < self._steps and (index + 1) % self._every == 0:
            self._preview(self._latent_preview.pictures(tensors["latents"], self._size))
        if done < self._steps and self._encoded.steps[done] is not self._encoded.steps[done - 1]:
            tensors |= self._turn(pipeline, self._encoded.steps[done])
        return tensors

    def upscaling(self, done: int, total: int) -> None:
        if done < total:
            self._tell(self._steps + 1)

    def end(self) -> None:
        self._tell(self._each)

    def _turn(self, pipeline: Any, now: Embeddings) -> dict[str, Any]:
        """The loop's own tensors for other embeddings: prompts of the whole batch, negative ones first."""
        guided = pipeline.do_classifier_free_guidance

        def whole(negative: torch.Tensor | None, positive: torch.Tensor) -> torch.Tensor:
            parts = [negative, positive] if guided and negative is not None else [positive]
            return torch.cat([part.repeat_interleave(self._pictures, 0) for part in parts])

        tensors = {"prompt_embeds": whole(now.negative, now.prompt)}
        if now.pooled is not None:
            tensors["add_text_embeds"] = whole(now.negative_pooled, now.pooled)
        return tensors

    def _check(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the generation was stopped before the picture was complete")

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(self._before + done, self._total)


def _settings(pipeline: Any, request: GenerationRequest, plan: Sizes, seed: int) -> dict[str, str]:
    """The picture's settings under Automatic1111's names."""
    sampler, schedule_type = sampler_name(pipeline.scheduler)
    settings = {"Steps": str(request.steps), "Sampler": sampler}
    if schedule_type != "Automatic":
        settings["Schedule type"] = schedule_type
    settings |= {"CFG scale": f"{request.guidance_scale:g}", "Seed": str(seed), "Size": _by(plan.asked)}
    settings["Model"] = model_name(pipeline)
    if request.init_image is not None:
        settings["Denoising strength"] = f"{request.strength:g}"
    if request.mask is not None and request.masked_content != "original":
        settings["Masked content"] = request.masked_content
    if request.clip_skip > 1:
        settings["Clip skip"] = str(request.clip_skip)
    if plan.denoised != plan.asked:
        settings["Denoised size"] = _by(plan.denoised)
    upscale = plan.final[0] / plan.asked[0]
    if upscale != 1:
        settings["Postprocess upscale by"] = f"{upscale:g}"
    if plan.factor != 1:
        settings["Postprocess upscaler"] = pipeline.upscaler.network.architecture
    if request.loras:
        settings["Loras"] = ", ".join(f"{Path(file).stem}: {weight:g}" for file, weight in request.loras)
    settings["RNG"] = "CPU" if request.noise_device == "cpu" else "GPU"
    settings["Version"] = f"diptych {__version__}"
    return settings


def _native_size(pipeline: Any) -> tuple[int, int]:
    """(width, height) in pixels of what the model was trained on."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor


def _centre(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Cuts what is more than `size` (width, height) off the sides, equally."""
    top, left = (pictures.shape[2] - size[1]) // 2, (pictures.shape[3] - size[0]) // 2
    return pictures[:, :, top : top + size[1], left : left + size[0]]


def _round_to(value: float, unit: int) -> int:
    return max(round(value / unit), 1) * unit


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} is {value:g}, and must be between {low:g} and {high:g}")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
