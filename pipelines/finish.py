"""What Diptych adds to a diffusers pipeline: seeds, a decode that is checked, and the GAN after the decode.

`Finish` is mixed into diffusers' own classes (`diptych.pipelines.diptych`) and calls their `__call__`; no loop of
theirs is repeated here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

from diptych.errors import DiptychError, UnknownArchitecture
from diptych.pipelines.upscaler import DiptychUpscaler
from diptych.upscalers.channels import for_any_channels
from diptych.upscalers.engine import upscale_rows
from diptych.upscalers.official import embedded_model
from diptych.upscalers.passes import Model
from diptych.upscalers.runner import halo_of
from diptych.upscalers.sources import TensorSource

logger = logging.getLogger(__name__)

_BLACK = -1 + 1 / 255  # a decoded picture (-1..1) that nowhere exceeds this is written as 8-bit zeros


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
        seed: int | Sequence[int] | None = None,
        noise_device: str | torch.device = "cpu",
        output_type: str = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in diffusers, with three arguments more.

        upscale: enlarge the decoded picture this many times with `upscaler`; None and 1: not at all.
        seed: one whole number, or one for each picture. Every picture draws from a generator of its own, so that its
            noise does not depend on the batch it is made in. One seed for a batch counts up: seed, seed + 1, ...
            A list of seeds with a single prompt makes as many pictures.
        noise_device: where the noise of `seed` is drawn. "cpu" gives the same noise on every machine.

        Raises ValueError for a combination that makes no sense, DiptychError if no picture comes out of the decoder.
        """
        finished: dict[str, Any] = {}
        upscale = None if upscale == 1 else upscale
        if upscale is not None:
            self._check_upscale(upscale, output_type, kwargs)
            finished["output_type"] = "pt"
        else:
            finished["output_type"] = output_type
        if seed is not None:
            kwargs |= self._seeded(seed, noise_device, args, kwargs)
        self.notes = []
        try:
            with checked_decode(getattr(self, "vae", None), self.notes):
                output = super().__call__(*args, return_dict=True, **finished, **kwargs)  # type: ignore[misc]
            if upscale is not None:
                pictures = self.upscale_pictures(output.images, upscale)
                # Already 0..1: the processor is only asked to convert.
                keep = [False] * len(pictures)
                output.images = self.image_processor.postprocess(  # type: ignore[attr-defined]
                    pictures, output_type=output_type, do_denormalize=keep
                )
        finally:
            self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        return output if return_dict else tuple(getattr(output, field.name) for field in dataclasses.fields(output))

    @torch.no_grad()
    def upscale_pictures(
        self,
        pictures: torch.Tensor,
        upscale: float,
        progress: Callable[[int, int], None] | None = None,
        cancel: Any = None,
    ) -> torch.Tensor:
        """Enlarges pictures (N, 3, H, W), 0..1, `upscale` times with the GAN; they stay on their device, unrounded."""
        if self.upscaler is None:
            raise ValueError("this pipeline has no upscaler: load one with upscaler=DiptychUpscaler.from_name(...)")
        network = self.upscaler.network
        model = Model(
            compute=for_any_channels(self.upscaler, network.in_channels),
            scale=network.scale,
            halo=halo_of(network),
            multiple=network.multiple,
            device=pictures.device,
            on_overflow=self.upscaler.widen,
        )
        strips = upscale_rows(model, TensorSource(pictures), upscale, progress=progress, cancel=cancel)
        return torch.cat(list(strips), dim=2).clamp(0, 1)  # Lanczos may overshoot

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


@contextmanager
def checked_decode(vae: Any, notes: list[str]) -> Iterator[None]:
    """While it is open, `vae.decode` looks at what it made: NaN and black pictures are decoded once more in fp32.

    What was found is added to `notes` and logged. Raises DiptychError for latents or pictures that stay NaN.
    """
    if vae is None:
        yield
        return
    plain = vae.decode

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.isfinite(latents).all():
            raise DiptychError(
                "the denoising gave NaN instead of a picture: take another scheduler or more steps, or compute in fp32"
                " or bf16 where it was fp16; if nothing helps, the weights of the model are damaged"
            )
        output = plain(latents, *args, **kwargs)
        pictures = output[0]
        bad = _broken(pictures)
        if bad and vae.dtype is not torch.float32:
            was = str(vae.dtype).removeprefix("torch.")
            with in_fp32(vae):
                again = plain(latents.float(), *args, **kwargs)[0]
            pictures[bad] = again[bad].to(pictures.dtype)
            _note(notes, f"the decode in {was} gave {_count(bad)} black or NaN: decoded again in fp32")
            bad = _broken(pictures)
        if not torch.isfinite(pictures).all():
            raise DiptychError("the VAE gives NaN even in fp32: its weights are damaged; try another one with --vae")
        if bad:
            _note(notes, f"{_count(bad)} all black, in fp32 too")
        return output

    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode


def _broken(pictures: torch.Tensor) -> list[int]:
    """Indices of pictures (N, C, H, W), -1..1, that hold NaN or infinity or are black."""
    flat = pictures.flatten(1)
    bad = ~torch.isfinite(flat).all(1) | (flat <= _BLACK).all(1)
    return [i for i, is_bad in enumerate(bad.tolist()) if is_bad]


def _count(bad: list[int]) -> str:
    return "one picture" if len(bad) == 1 else f"{len(bad)} pictures"


def _note(notes: list[str], sentence: str) -> None:
    notes.append(sentence)
    logger.warning(sentence)


@contextmanager
def in_fp32(vae: Any) -> Iterator[None]:
    """Holds the VAE in fp32; weights that sequential offload keeps elsewhere are fetched and given back."""
    dtype = vae.dtype
    with _without_sequential_offload(vae):
        torch.nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns of what does not matter here
        try:
            yield
        finally:
            torch.nn.Module.to(vae, dtype)


def _without_sequential_offload(vae: Any) -> AbstractContextManager[None]:
    hooks = [m._hf_hook for m in vae.modules() if isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook)]
    if not any(hook.offload for hook in hooks):
        return nullcontext()
    return _fetched(vae, next(hook.execution_device for hook in hooks if hook.offload))


@contextmanager
def _fetched(vae: Any, device: torch.device) -> Iterator[None]:
    remove_hook_from_module(vae, recurse=True)
    vae.to(device)
    try:
        yield
    finally:
        vae.to("cpu")
        cpu_offload(vae, device, offload_buffers=len(vae._parameters) > 0)
