"""What Diptych adds to a diffusers pipeline: seeds, a decode that is checked, the GAN after the decode, refinement.

`Finish` is mixed into diffusers' own classes (`diptych.pipelines.diptych`) and calls their `__call__`; no loop of
theirs is repeated here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from diptych.errors import UnknownArchitecture
from diptych.pipelines.decode import checked_decode, decode_rows, denormalised, encode_rows, normalised
from diptych.pipelines.refine import in_tiles, steps_for
from diptych.pipelines.saving import to_file
from diptych.pipelines.upscaler import DiptychUpscaler
from diptych.upscalers.channels import for_any_channels
from diptych.upscalers.engine import output_size, upscale_rows
from diptych.upscalers.official import embedded_model
from diptych.upscalers.passes import Cancel, Model, Progress
from diptych.upscalers.picture_writer import check_writable
from diptych.upscalers.runner import halo_of, pixels_for
from diptych.upscalers.sources import Source, StripSource, TensorSource

T = TypeVar("T")

# What a call says of the size or the picture it begins from, which the refinement's own take the place of.
_FIRST_ONLY = {"height", "width", "image", "strength", "latents", "original_size", "target_size", "timesteps", "sigmas"}
_ROWS = 64  # of a picture that is not enlarged, at a time


class Finish:
    """Mixin for diffusers' Stable Diffusion pipelines.

    `notes` lists, in sentences, what was noticed during the last call (a decode that had to be repeated).
    """

    notes: list[str]
    upscaler: DiptychUpscaler | None

    def __init__(self, *, upscaler: DiptychUpscaler | None, **components: Any) -> None:
        super().__init__(**components)
        self.register_modules(upscaler=upscaler)  # type: ignore[attr-defined]
        self.notes = []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None = None, **kwargs: Any) -> Any:
        """As in diffusers; with no argument, the embedded model."""
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = embedded_model()
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        prediction_type: str | None = None,
        **components: Any,
    ) -> Any:
        """A checkpoint file (`.safetensors`, `.ckpt`) in the original key layout; no network: see `read_components`.

        Raises UnknownArchitecture for a file of a family that this class does not draw.
        """
        from diptych.pipelines.single_file import read_components

        upscaler = components.pop("upscaler", None)
        parts, family, inpaints = read_components(
            pretrained_model_link_or_path,
            config=config,
            torch_dtype=torch_dtype,
            prediction_type=prediction_type,
            **components,
        )
        if family.is_xl != ("text_encoder_2" in inspect.signature(cls.__init__).parameters):
            raise UnknownArchitecture(
                f"{pretrained_model_link_or_path} is {family.name}: {cls.__name__} cannot draw it"
            )
        if inpaints and "Inpaint" not in cls.__name__:
            raise UnknownArchitecture(
                f"{pretrained_model_link_or_path} is an inpainting model: {cls.__name__} cannot draw it"
            )
        if not family.is_xl:
            parts["requires_safety_checker"] = False
        pipeline = cls(**parts, upscaler=upscaler)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_link_or_path))  # type: ignore[attr-defined]
        return pipeline

    def to_json_string(self) -> str:
        """The text of `model_index.json`. It names diffusers' class, so that diffusers alone can open the folder."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("diffusers."))
        if self.upscaler is None:
            config.pop("upscaler", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        upscale: float | None = None,
        refine: float | None = None,
        seed: int | Sequence[int] | None = None,
        noise_device: str | torch.device = "cpu",
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers, with four arguments more.

        upscale: enlarge the decoded picture this many times with `upscaler`; None and 1: not at all.
        refine: 0..1; then draw the enlarged picture anew to this extent, as image-to-image does with `strength`, in
            tiles where it is larger than the model can hold. Its sides become multiples of 8.
        seed: one whole number, or one for each picture. Every picture draws from a generator of its own, so that its
            noise does not depend on the batch it is made in. One seed for a batch counts up: seed, seed + 1, ...
            A list of seeds with a single prompt makes as many pictures.
        noise_device: where the noise of `seed` is drawn. "cpu" gives the same noise on every machine.

        Raises ValueError for a combination that makes no sense, DiptychError if no picture comes out of the decoder.
        """
        upscale = None if upscale == 1 else upscale
        if upscale is not None:
            self._check_upscale(upscale, output_type if refine is None else "pil", kwargs)
        if refine is not None:
            self.check_refine(refine)
            if upscale is None:
                raise ValueError("refine draws an enlarged picture anew: say how many times with upscale=")
        if seed is not None:
            kwargs |= self._seeded(seed, noise_device, args, kwargs)
        first = super().__call__  # type: ignore[misc]
        self.notes = []
        try:
            if refine is None or upscale is None:
                with checked_decode(getattr(self, "vae", None), self.notes):
                    kind = output_type if upscale is None else "pt"
                    output = first(*args, return_dict=True, output_type=kind, **kwargs)
                if upscale is not None:
                    output.images = self._as(output_type, self.upscale_pictures(output.images, upscale))
            else:
                arguments = inspect.signature(first).bind_partial(*args, **kwargs).arguments
                arguments |= arguments.pop("kwargs", {})
                latents = first(**arguments, return_dict=True, output_type="latent").images
                if seed is not None:  # as if the second call had been given the same seeds
                    fresh = [(one.initial_seed(), one.device) for one in arguments["generator"]]
                    arguments["generator"] = [generators([number], device)[0] for number, device in fresh]
                output = self._refined(latents, upscale, refine, output_type, arguments)
        finally:
            self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return output if return_dict else tuple(getattr(output, field.name) for field in dataclasses.fields(output))

    @torch.no_grad()
    def upscale_pictures(
        self, pictures: torch.Tensor, upscale: float, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Enlarges pictures (N, 3, H, W), 0..1, `upscale` times with the GAN; they stay on their device, unrounded."""
        return torch.cat(list(self.enlarged(TensorSource(pictures), upscale, None, progress, cancel)), dim=2)

    @torch.no_grad()
    def decode_to_file(
        self,
        latents: torch.Tensor,
        file: str | os.PathLike[str],
        *,
        upscale: float | None = None,
        parameters: str | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> tuple[int, int]:
        """Decodes latents (1, C, h, w), as `output_type="latent"` gives them, enlarges the picture `upscale` times with
        the GAN, and writes it to `file`, row by row as the rows come. Returns its (width, height).

        Memory does not grow with the picture: see `strips`. parameters: a text for a PNG. progress: of the GAN.
        Raises ImageError before the work if the file cannot be written or may be too large for its disk, ValueError
        for more than one picture or without an upscaler, DiptychError if no picture comes out of the decoder.
        """
        if len(latents) != 1:
            raise ValueError(f"these are latents of {len(latents)} pictures: give one of them, latents[i : i + 1]")
        factor = self.vae_scale_factor * (upscale or 1)  # type: ignore[attr-defined]
        size = (math.floor(latents.shape[3] * factor + 0.5), math.floor(latents.shape[2] * factor + 0.5))
        check_writable(file, (size[1], size[0], 3))
        self.notes = []

        def write(picture: Source) -> None:
            strips = self.enlarged(picture, upscale or 1, None, progress, cancel)
            to_file(Path(file), strips, size, parameters)

        try:
            self.decode_rows(latents, write, cancel)
        finally:
            self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return size

    def decode_rows(self, latents: torch.Tensor, use: Callable[[Source], T], cancel: Cancel | None = None) -> T:
        """What `use` makes of the picture of latents (1, C, h, w), rows of 0..1: see `diptych.pipelines.decode`."""
        vae = self.vae  # type: ignore[attr-defined]
        # As diffusers does for SDXL, whose own VAE overflows.
        fp32 = vae.dtype is torch.float16 and vae.config.force_upcast and hasattr(self, "text_encoder_2")
        return decode_rows(vae, denormalised(vae, latents), use, notes=self.notes, fp32=fp32, cancel=cancel)

    def enlarged(
        self,
        picture: Source,
        upscale: float,
        size: tuple[int, int] | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Iterator[torch.Tensor]:
        """Strips (N, 3, some, width), 0..1, of pictures enlarged `upscale` times by the GAN.

        size: (width, height) that is cut from the middle of the result.
        """
        height, width = picture.height, picture.width
        strips: Iterator[torch.Tensor] = iter([])
        if upscale == 1:
            strips = (picture.rows(top, min(top + _ROWS, height)) for top in range(0, height, _ROWS))
        else:
            if self.upscaler is None:
                raise ValueError("this pipeline has no upscaler: load one with upscaler=DiptychUpscaler.from_name(...)")
            network = self.upscaler.network
            device = self._execution_device  # type: ignore[attr-defined]
            model = Model(
                compute=for_any_channels(self.upscaler, network.in_channels),
                scale=network.scale,
                halo=halo_of(network),
                multiple=network.multiple,
                device=device,
                pixels=pixels_for(network, device, self.upscaler.dtype),
                on_overflow=self.upscaler.widen,
                modules=self.upscaler.modules,
            )
            strips = upscale_rows(model, picture, upscale, progress=progress, cancel=cancel)
            height, width = output_size(height, width, upscale)
        return strips if size is None else _middle(strips, height, width, size)

    def larger_latents(
        self,
        latents: torch.Tensor,
        upscale: float,
        size: tuple[int, int],
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """The latents of the picture of latents (1, C, h, w), enlarged `upscale` times by the GAN.

        size: (width, height) in pixels, multiples of the VAE's, that is cut from the middle. In between it is never
        rounded, and never whole: rows of it are decoded, enlarged and encoded as they come.
        """
        vae = self.vae  # type: ignore[attr-defined]

        def encode(picture: Source) -> torch.Tensor:
            strips = self.enlarged(picture, upscale, size, progress, cancel)
            return encode_rows(vae, StripSource(strips, 1, size[1], size[0]), cancel=cancel)

        return normalised(vae, self.decode_rows(latents, encode, cancel)).to(latents)

    def check_refine(self, refine: float) -> None:
        """Raises ValueError if this pipeline cannot draw an enlarged picture anew to the extent of `refine`."""
        if not 0 < refine <= 1:
            raise ValueError(f"refine is {refine:g}, and must be more than 0 and at most 1")
        if getattr(self.vae, "encoder", None) is None:  # type: ignore[attr-defined]
            raise ValueError("refine encodes the enlarged picture, and the VAE of this model has no encoder: --vae ...")
        if "Inpaint" in type(self).__name__:
            raise ValueError("refine draws the whole picture anew: it does not go with inpainting")

    def _refined(
        self, latents: torch.Tensor, upscale: float, refine: float, output_type: str, arguments: dict[str, Any]
    ) -> Any:
        """The output of image-to-image, begun from the enlarged pictures of `latents`, with the other `arguments`."""
        from diptych.pipelines.diptych import in_task

        unit = math.lcm(8, self.vae_scale_factor)  # type: ignore[attr-defined]
        factor = self.vae_scale_factor * upscale  # type: ignore[attr-defined]
        width, height = (max(math.ceil(latents.shape[side] * factor / unit - 0.5), 1) * unit for side in (3, 2))
        covering = max(width / latents.shape[3], height / latents.shape[2]) / self.vae_scale_factor  # type: ignore[attr-defined]
        larger = torch.cat([self.larger_latents(one[None], covering, (width, height)) for one in latents])
        again = in_task(self, "Img2Img")
        takes = inspect.signature(super(Finish, again).__call__).parameters  # type: ignore[misc]
        kept = {name: value for name, value in arguments.items() if name in takes and name not in _FIRST_ONLY}
        steps = kept.get("num_inference_steps", takes["num_inference_steps"].default)
        kept["num_inference_steps"] = steps_for(max(int(steps * refine), 1), refine)
        with in_tiles(again, (larger.shape[2], larger.shape[3])):
            output = again(image=larger, strength=refine, output_type=output_type, **kept)
        self.notes += again.notes
        return output

    def _as(self, output_type: str, pictures: torch.Tensor) -> Any:
        """Pictures, 0..1, as PIL images, arrays or tensors."""
        keep = [False] * len(pictures)  # already 0..1: the processor is only asked to convert
        return self.image_processor.postprocess(pictures, output_type=output_type, do_denormalize=keep)  # type: ignore[attr-defined]

    def _check_upscale(self, upscale: float, output_type: str, kwargs: dict[str, Any]) -> None:
        if self.upscaler is None:
            raise ValueError("upscale= needs an upscaler, and this pipeline has none: pass upscaler= when loading it")
        if not 0 < upscale <= 64:
            raise ValueError(f"upscale is {upscale}, and must be more than 0 and at most 64")
        if output_type == "latent":
            raise ValueError('output_type="latent" has no picture to enlarge: leave upscale out')
        if kwargs.get("padding_mask_crop") is not None:
            raise ValueError("padding_mask_crop pastes onto an 8-bit picture: leave upscale out and enlarge the result")

    def _seeded(
        self, seed: int | Sequence[int], noise_device: str | torch.device, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if kwargs.get("generator") is not None:
            raise ValueError("seed and generator say the same thing: give one of them")
        prompt = args[0] if args else kwargs.get("prompt")
        embeds = kwargs.get("prompt_embeds")
        prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1 if embeds is None else len(embeds)
        per_prompt = kwargs.get("num_images_per_prompt") or 1
        if isinstance(seed, int):
            seeds = [seed + i for i in range(prompts * per_prompt)]
        else:
            seeds = list(seed)
            if prompts == 1 and per_prompt == 1:
                per_prompt = len(seeds)
        if len(seeds) != prompts * per_prompt or not seeds:
            raise ValueError(f"{len(seeds)} seeds for {prompts * per_prompt} pictures: give one seed, or one for each")
        device = torch.device(self._execution_device if noise_device == "device" else noise_device)  # type: ignore[attr-defined]
        return {"generator": generators(seeds, device), "num_images_per_prompt": per_prompt}


def generators(seeds: Sequence[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """One random generator for each picture."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _middle(strips: Iterator[torch.Tensor], height: int, width: int, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    """The middle of `size` (width, height) of a picture in strips."""
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    done = 0
    for strip in strips:
        first, last = max(top - done, 0), min(top + size[1] - done, strip.shape[2])
        done += strip.shape[2]
        if first < last:
            yield strip[:, :, first:last, left : left + size[0]]
