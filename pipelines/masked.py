"""What the masked part of a picture begins from: Automatic1111's "Masked content".

Mixed into the inpainting pipelines (`diptych.pipelines.diptych`); what is kept, and the denoising, are diffusers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from diptych.pipelines.finish import generators

MASKED_CONTENT = ("fill", "original", "latent noise", "latent nothing")
"""In the order of Automatic1111's `inpainting_fill`, 0 .. 3."""


class MaskedContent:
    """Mixin for diffusers' inpainting pipelines."""

    _start: tuple[str, torch.Tensor] | None = None  # the kind of latents and their mask
    _preparing = False

    def __call__(self, *args: Any, masked_content: str = "original", **kwargs: Any) -> Any:
        """As in diffusers, with one argument more; it makes a difference where `strength` is less than 1.

        masked_content: what is drawn over begins, under its noise, from the picture itself ("original"), from the
            colours around it ("fill"), from noise ("latent noise") or from zero latents ("latent nothing").

        Raises ValueError for another name, or without `image=` and `mask_image=` as keywords.
        """
        if masked_content == "original":
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if masked_content not in MASKED_CONTENT:
            raise ValueError(f"masked content is {masked_content!r}: choose one of {', '.join(MASKED_CONTENT)}")
        if "image" not in kwargs or "mask_image" not in kwargs or kwargs.get("padding_mask_crop") is not None:
            raise ValueError("masked_content needs image= and mask_image=, and no padding_mask_crop")
        sides = {"height": kwargs.get("height"), "width": kwargs.get("width")}
        mask = self.mask_processor.preprocess(kwargs["mask_image"], **sides)  # type: ignore[attr-defined]
        if masked_content == "fill":
            picture = self.image_processor.preprocess(kwargs["image"], **sides)  # type: ignore[attr-defined]
            kwargs["image"] = fill(picture / 2 + 0.5, mask)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        self._start = (masked_content, mask)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._start = None

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        """diffusers'; the picture that is encoded within it gets its masked part replaced."""
        self._preparing = True
        try:
            return super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._preparing = False

    def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
        if isinstance(generator, list) and len(image) == 1:
            # diffusers would draw from the first generator alone, and the pictures would depend on their batch.
            image = image.expand(len(generator), -1, -1, -1)
        latents = super()._encode_vae_image(image, generator)  # type: ignore[misc]
        return emptied(latents, generator, *self._start) if self._preparing and self._start else latents


def fill(pictures: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pictures (N, C, H, W), 0..1, whose masked pixels have the colours around them, smoothly; the others stay.

    mask: (N or 1, 1, H, W), 1 where it is to be filled. Where all is masked the result is grey.
    Push-pull over a pyramid: Gortler et al., The Lumigraph (1996), section 3.5.
    """
    weight = (1 - mask).expand(len(pictures), -1, -1, -1)
    levels = [(pictures * weight, weight)]
    while max(levels[-1][1].shape[2:]) > 1:
        levels.append(tuple(functional.avg_pool2d(part, 2, ceil_mode=True) for part in levels[-1]))  # type: ignore[arg-type]
    colours, weight = levels.pop()
    filled = torch.where(weight > 0, colours / weight.clamp(min=1e-12), 0.5)
    for colours, weight in reversed(levels):
        around = functional.interpolate(filled, size=weight.shape[2:], mode="bilinear", align_corners=False)
        filled = torch.lerp(around, colours / weight.clamp(min=1e-12), weight)  # a coarse pixel may be known in part
    return torch.lerp(pictures, filled, mask)


def emptied(latents: torch.Tensor, generator: Any, content: str, mask: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) with zeros, or each picture's own noise, where `mask` (1, 1, H, W) is 1."""
    mask = functional.interpolate(mask, size=latents.shape[2:]).to(latents)
    if content == "latent nothing":
        return latents * (1 - mask)
    if generator is None:
        noise = torch.randn_like(latents)
    else:
        made = generator if isinstance(generator, list) else [generator]
        fresh = [generators([one.initial_seed()], one.device)[0] for one in made]  # theirs must not be used up
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one, device=one.device) for one in fresh])
    return torch.lerp(latents.expand(len(noise), -1, -1, -1), noise.to(latents), mask)
