"""diffusers' image-to-image and inpainting for autoencoders of any number of latent channels.

Stable Diffusion 1 and 2 have four, and diffusers writes that number into these two: what has four channels is latents,
and a UNet of four is a plain one. The embedded model has sixteen.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

_PLAIN = 4


class LatentsAsImage:
    """Mixin for the image-to-image pipelines: `image` may be latents of the autoencoder's own number of channels."""

    vae: Any
    image_processor: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        if self._latent_channels != 3:
            self.image_processor.register_to_config(vae_latent_channels=self._latent_channels)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def prepare_latents(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """diffusers'; latents that it does not know for some pass through its encoding unchanged."""
        if self._latent_channels in (3, _PLAIN) or image.shape[1] != self._latent_channels:
            return super().prepare_latents(image, *args, **kwargs)  # type: ignore[misc]
        scaling = self.vae.config.scaling_factor
        self.vae.__dict__["encode"] = lambda latents: SimpleNamespace(latents=latents / scaling)
        try:
            return super().prepare_latents(image, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.vae.__dict__["encode"]

    @property
    def _latent_channels(self) -> int:
        """With 3 what looks like a picture is one."""
        return self.vae.config.latent_channels


class PlainUNets:
    """Mixin for the inpainting pipelines: a UNet that takes the latents and nothing else is a plain one."""

    vae: Any
    unet: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, which reads from the UNet's configuration only which kind it is."""
        config = self.unet.config
        if config.in_channels != self.vae.config.latent_channels:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        self.unet._internal_dict = FrozenDict({**config, "in_channels": _PLAIN})
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.unet._internal_dict = config
