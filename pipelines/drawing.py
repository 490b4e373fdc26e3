"""Drawing the pictures of one batch: what is asked of a pipeline, who watches it, and what becomes of its latents.

`generation` decides what to draw, in which sizes and with which seeds; this module calls the pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from diptych.errors import Cancelled
from diptych.pipelines.diptych import in_task
from diptych.pipelines.encoding import Embeddings, EncodedPrompt
from diptych.pipelines.latents import enlarge_latents
from diptych.pipelines.preview import LatentPreview
from diptych.pipelines.refine import in_tiles, steps_for
from diptych.pipelines.saving import to_file, to_pil
from diptych.upscalers.passes import Cancel as CancelToken
from diptych.upscalers.sources import ArraySource, Source, TensorSource

if TYPE_CHECKING:
    from diptych.pipelines.generation import GenerationRequest, Sizes


def draw(
    pipeline: Any, request: GenerationRequest, plan: Sizes, first: Embeddings, seeds: list[int], watch: Watch
) -> torch.Tensor:
    """The latents of one batch, (N, C, h, w); pictures before upscaling, (N, 3, H, W), 0..1, of a pipeline that has
    more to do with them."""
    arguments = _arguments(request, first, seeds, watch)
    arguments |= {"num_inference_steps": request.steps, "output_type": "latent"}
    if plan.refined is None:
        arguments["output_type"] = _output_type(pipeline)
    width, height = plan.denoised
    if request.init_image is None:
        arguments |= {"width": width, "height": height}
    else:
        arguments |= {"image": _fit(request.init_image, plan.denoised), "strength": request.strength}
    if request.mask is not None:
        mask = _fit_mask(request.mask, plan.denoised)
        arguments |= {"mask_image": mask, "width": width, "height": height, "masked_content": request.masked_content}
    return pipeline(**arguments).images


class Refinement:
    """The second drawing, of the enlarged picture."""

    def __init__(self, pipeline: Any, request: GenerationRequest, plan: Sizes, embeddings: Embeddings) -> None:
        assert request.refine is not None
        self.steps = request.refine_steps or max(int(request.steps * request.refine), 1)
        self._first, self._again = pipeline, in_task(pipeline, "Img2Img")
        self._request, self._plan, self._embeddings = request, plan, embeddings

    @torch.no_grad()
    def draw(self, latents: torch.Tensor, seeds: list[int], watch: Watch, cancel: CancelToken | None) -> torch.Tensor:
        """As `draw`, begun from what that made."""
        request, size = self._request, self._plan.refined
        assert request.refine is not None and size is not None
        unit = self._first.vae_scale_factor
        if request.latent_mode is not None:
            larger = enlarge_latents(latents, (size[0] // unit, size[1] // unit), request.latent_mode)
        else:
            parts = [self._first.larger_latents(one[None], self._plan.factor, size, None, cancel) for one in latents]
            larger = torch.cat(parts)
        watch.refine()
        arguments = _arguments(request, self._embeddings, seeds, watch)
        steps = steps_for(self.steps, request.refine)
        arguments |= {"num_inference_steps": steps, "strength": request.refine, "image": larger}
        scheduler = self._first.scheduler
        self._again.scheduler = type(scheduler).from_config(scheduler.config)  # some keep what the last picture left
        with in_tiles(self._again, (larger.shape[2], larger.shape[3]), cancel=cancel):
            drawn = self._again(**arguments, output_type=_output_type(self._again)).images
        self._first.notes += self._again.notes
        return drawn


def _arguments(request: GenerationRequest, embeddings: Embeddings, seeds: list[int], watch: Watch) -> dict[str, Any]:
    """What every call of a pipeline is given."""
    arguments: dict[str, Any] = {
        "prompt_embeds": embeddings.prompt,
        "negative_prompt_embeds": embeddings.negative,
        "guidance_scale": request.guidance_scale,
        "seed": seeds,
        "noise_device": request.noise_device,
        "callback_on_step_end": watch.step,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    if embeddings.pooled is not None:
        arguments |= {
            "pooled_prompt_embeds": embeddings.pooled,
            "negative_pooled_prompt_embeds": embeddings.negative_pooled,
        }
    return arguments


def _output_type(pipeline: Any) -> str:
    """Pictures only for a pipeline that looks at them, or marks them, before they are enlarged."""
    looks = getattr(pipeline, "safety_checker", None) is not None or getattr(pipeline, "watermark", None) is not None
    return "pt" if looks else "latent"


@torch.no_grad()
def finish(
    pipeline: Any,
    request: GenerationRequest,
    plan: Sizes,
    drawn: torch.Tensor,
    file: Path | None,
    text: str,
    progress: Callable[[int, int], None],
    cancel: CancelToken | None,
) -> Image.Image:
    """Decodes and enlarges one picture, as an image, or into its file and opened there. drawn: what `draw` gives."""
    factor = 1.0 if plan.refined else plan.factor

    def use(picture: Source) -> Image.Image:
        if request.mask is not None and request.init_image is not None:
            picture = _Masked(picture, request.init_image, request.mask, plan.denoised)
        strips = pipeline.enlarged(picture, factor, plan.final, progress, cancel)
        if file is None:
            return to_pil(strips, plan.final)
        to_file(file, strips, plan.final, text)
        return PngImagePlugin.PngImageFile(file)  # and not Image.open, which refuses large ones

    if _output_type(pipeline) == "latent":
        return pipeline.decode_rows(drawn, use, cancel)
    return use(TensorSource(drawn))


class _Masked:
    """A drawn picture with what the mask keeps from the first one: the VAE changes every pixel a little."""

    def __init__(self, drawn: Source, init: Image.Image, mask: Image.Image, size: tuple[int, int]) -> None:
        self.batch, self.height, self.width = drawn.batch, drawn.height, drawn.width
        self._drawn = drawn
        self._kept = ArraySource(np.asarray(_fit(init, size))[None])
        self._mask = ArraySource(np.asarray(_fit_mask(mask, size))[None, ..., None])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        drawn = self._drawn.rows(start, stop)
        kept, mask = (source.rows(start, stop).to(drawn) for source in (self._kept, self._mask))
        return torch.lerp(kept, drawn, mask.expand_as(drawn))


def _fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    return ImageOps.fit(mask.convert("L"), size, Image.Resampling.BILINEAR)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in RGB, enlarged or shrunk to cover `size`, cut around its centre."""
    return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)


class Watch:
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
        again: Refinement | None,
        batches: int,
        plan: Sizes,
    ) -> None:
        self._encoded, self._progress, self._cancel, self._preview = encoded, progress, cancel, preview
        self._every, self._first_steps, self._again, self._plan = preview_every, steps, again, plan
        self._latent_preview = LatentPreview(pipeline) if preview is not None else None
        # Of each batch, decoding counts as one step, and upscaling as another; so does what comes before refining.
        self._each = steps + 2 + (again.steps + 1 if again else 0)
        self._total = batches * self._each
        self._before = self._pictures = self._offset = 0
        self._steps, self._size = steps, plan.denoised

    def begin(self, number: int, pictures: int) -> None:
        self._before, self._pictures, self._offset = number * self._each, pictures, 0
        self._steps, self._size = self._first_steps, self._plan.denoised
        self._check()
        self._tell(0)

    def refine(self) -> None:
        """The steps from here on are those of the refinement."""
        assert self._again is not None and self._plan.refined is not None
        self._offset = self._first_steps + 1
        self._steps, self._size = self._again.steps, self._plan.refined
        self._check()
        self._tell(self._offset)

    def step(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`."""
        self._check()
        done = min((index + 1) * self._steps // pipeline.num_timesteps, self._steps)  # some samplers take half steps
        self._tell(self._offset + done)
        if self._preview and self._latent_preview and done < self._steps and (index + 1) % self._every == 0:
            self._preview(self._latent_preview.pictures(tensors["latents"], self._size))
        if not self._offset and done < self._steps and self._encoded.steps[done] is not self._encoded.steps[done - 1]:
            tensors |= self._turn(pipeline, self._encoded.steps[done])
        return tensors

    def finishing(self, index: int) -> Callable[[int, int], None]:
        """For the GAN's progress with picture `index` of the batch."""

        def report(done: int, total: int) -> None:
            part = (index + done / total) / self._pictures
            self._tell(self._each - 2 + min(int(2 * part), 1))

        return report

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
