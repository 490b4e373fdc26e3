"""Rough pictures of unfinished latents: a linear map from latent channels to RGB, measured once for each VAE."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch.nn import functional

from diptych.pipelines.decode import in_fp32

_SIDE = 8  # latent pixels along a side of the pictures that the map is measured with

_maps: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()


class LatentPreview:
    """Turns latents (N, C, h, w) into rough pictures. Measuring costs one encode of eight small pictures."""

    def __init__(self, pipeline: Any) -> None:
        if pipeline.vae not in _maps:
            _maps[pipeline.vae] = _measure(pipeline.vae, pipeline._execution_device)
        self._map = _maps[pipeline.vae]
        self._processor = pipeline.image_processor

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor, size: tuple[int, int]) -> list[Image.Image]:
        """One RGB picture of `size` (width, height) for each of the latents, however noisy they still are."""
        latents = latents.detach().float().cpu()
        # Schedulers with sigmas begin with latents far larger than the VAE's own: bring them to its range.
        spread = latents.flatten(1).std(1).clamp(min=1).view(-1, 1, 1, 1)
        flat = (latents / spread).movedim(1, -1)
        rgb = torch.cat([flat, torch.ones_like(flat[..., :1])], -1) @ self._map
        rgb = functional.interpolate(rgb.movedim(-1, 1), size=(size[1], size[0]), mode="bilinear").clamp(0, 1)
        return list(self._processor.postprocess(rgb, output_type="pil", do_denormalize=[False] * len(rgb)))


@torch.no_grad()
def _measure(vae: Any, device: torch.device) -> torch.Tensor:
    """(C + 1, 3), the last row a constant: least squares from the latents of smooth coloured pictures to their RGB."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    noise = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    colours = functional.interpolate(noise, size=(_SIDE, _SIDE), mode="bilinear", align_corners=True)
    pictures = functional.interpolate(colours, scale_factor=factor, mode="nearest").to(device) * 2 - 1
    with in_fp32(vae):  # some VAEs overflow in fp16
        latents = vae.encode(pictures).latent_dist.mode().cpu() * vae.config.scaling_factor
    samples = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    samples = torch.cat([samples, torch.ones_like(samples[:, :1])], 1)
    return torch.linalg.lstsq(samples, colours.movedim(1, -1).reshape(-1, 3), driver="gelsd").solution
