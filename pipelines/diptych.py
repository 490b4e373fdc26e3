"""The pipelines: diffusers' own Stable Diffusion classes, each with one component more, `upscaler`.

`__init__` names and annotates every component, because diffusers reads its signature to load and to convert.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diptych.pipelines.channels import LatentsAsImage, PlainUNets
from diptych.pipelines.finish import Finish
from diptych.pipelines.masked import MaskedContent
from diptych.pipelines.upscaler import DiptychUpscaler

_OPTIONAL = ["safety_checker", "feature_extractor", "image_encoder", "upscaler"]
_OPTIONAL_XL = [
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "image_encoder",
    "feature_extractor",
    "upscaler",
]


class _Components(Finish):
    """The components of Stable Diffusion 1 and 2."""

    text_encoder: Any
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae->upscaler"
    _optional_components = _OPTIONAL

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        upscaler: DiptychUpscaler = None,  # type: ignore[assignment]
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            upscaler=upscaler,
            requires_safety_checker=requires_safety_checker,
        )

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, whose clip skip asks for an attribute that transformers 5.6 took away."""
        attributes = self.text_encoder.__dict__
        if hasattr(self.text_encoder, "text_model"):
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        attributes["text_model"] = self.text_encoder
        try:
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        finally:
            del attributes["text_model"]


class _ComponentsXL(Finish):
    """The components of SDXL."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae->upscaler"
    _optional_components = _OPTIONAL_XL

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        upscaler: DiptychUpscaler = None,  # type: ignore[assignment]
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            upscaler=upscaler,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )


class _ComponentsXLFromPicture(Finish):
    """The components of SDXL where it begins from a picture: one setting more, for models conditioned on scores."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae->upscaler"
    _optional_components = _OPTIONAL_XL

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        upscaler: DiptychUpscaler = None,  # type: ignore[assignment]
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            upscaler=upscaler,
            requires_aesthetics_score=requires_aesthetics_score,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )


class DiptychPipeline(_Components, StableDiffusionPipeline):
    """Text to picture with Stable Diffusion 1.x and 2.x."""


class DiptychImg2ImgPipeline(LatentsAsImage, _Components, StableDiffusionImg2ImgPipeline):
    """Picture and text to picture with Stable Diffusion 1.x and 2.x."""


class DiptychInpaintPipeline(MaskedContent, PlainUNets, _Components, StableDiffusionInpaintPipeline):
    """Picture, mask and text to picture with Stable Diffusion 1.x and 2.x."""


class DiptychXLPipeline(_ComponentsXL, StableDiffusionXLPipeline):
    """Text to picture with SDXL."""


class DiptychXLImg2ImgPipeline(LatentsAsImage, _ComponentsXLFromPicture, StableDiffusionXLImg2ImgPipeline):
    """Picture and text to picture with SDXL."""


class DiptychXLInpaintPipeline(MaskedContent, PlainUNets, _ComponentsXLFromPicture, StableDiffusionXLInpaintPipeline):
    """Picture, mask and text to picture with SDXL."""


_TASKS: dict[tuple[str, bool], Any] = {
    ("Text", False): DiptychPipeline,
    ("Img2Img", False): DiptychImg2ImgPipeline,
    ("Inpaint", False): DiptychInpaintPipeline,
    ("Text", True): DiptychXLPipeline,
    ("Img2Img", True): DiptychXLImg2ImgPipeline,
    ("Inpaint", True): DiptychXLInpaintPipeline,
}


def in_task(pipeline: Any, task: str) -> Any:
    """The same components in the class for `task`: "Text", "Img2Img" or "Inpaint"."""
    is_xl = hasattr(pipeline, "text_encoder_2")
    cls = _TASKS[task, is_xl]
    if type(pipeline) is cls:
        return pipeline
    kept = ("force_zeros_for_empty_prompt", "requires_aesthetics_score") if is_xl else ("requires_safety_checker",)
    takes = inspect.signature(cls.__init__).parameters
    settings = {name: pipeline.config[name] for name in kept if name in takes and name in pipeline.config}
    other = cls(**pipeline.components, **settings)
    other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return other
