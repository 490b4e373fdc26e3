"""Image-to-image and inpainting with autoencoders that have not Stable Diffusion's four latent channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diptych.pipelines import DiptychPipeline
from diptych.pipelines.diptych import in_task


@pytest.fixture(scope="module", params=[2, 16])
def pipeline(request: pytest.FixtureRequest, tiny_pipeline_folder: Path) -> Any:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    torch.manual_seed(3)
    channels = {"in_channels": request.param, "out_channels": request.param}
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **channels})
    vae = AutoencoderKL.from_config({**pipeline.vae.config, "latent_channels": request.param})
    pipeline.register_modules(unet=unet.eval(), vae=vae.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_latents_given_as_the_image_are_drawn_on_as_the_picture_they_encode(pipeline, picture):
    img2img, used = in_task(pipeline, "Img2Img"), generator()
    with torch.no_grad():
        latents = img2img.vae.encode(picture * 2 - 1).latent_dist.sample(used) * img2img.vae.config.scaling_factor
    settings = {"num_inference_steps": 4, "strength": 0.5, "output_type": "latent"}
    of_latents = img2img("a cat", image=latents, generator=used, **settings).images
    of_picture = img2img("a cat", image=picture, generator=generator(), **settings).images
    assert of_latents.shape == latents.shape
    assert torch.allclose(of_latents, of_picture, atol=1e-4)


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_inpainting_keeps_what_the_mask_does_not_cover(pipeline, picture, masked):
    inpaint = in_task(pipeline, "Inpaint")
    mask = torch.full((1, 1, 64, 64), masked)
    arguments = {"image": picture, "mask_image": mask, "height": 64, "width": 64, "output_type": "latent"}
    drawn = inpaint("a cat", num_inference_steps=2, generator=generator(), **arguments).images
    with torch.no_grad():
        kept = inpaint.vae.encode(picture * 2 - 1).latent_dist.mean * inpaint.vae.config.scaling_factor
    spread = inpaint.vae.encode(picture * 2 - 1).latent_dist.std.max() * inpaint.vae.config.scaling_factor
    difference = (drawn - kept).abs().max()
    assert difference > 6 * spread if masked else difference < 6 * spread
    assert inpaint.unet.config.in_channels == inpaint.vae.config.latent_channels


def test_a_unet_for_neither_task_is_still_refused(pipeline, picture):
    inpaint = in_task(pipeline, "Inpaint")
    channels = {"in_channels": 7}
    inpaint.register_modules(unet=UNet2DConditionModel.from_config({**inpaint.unet.config, **channels}))
    with pytest.raises(ValueError, match="not 7"):
        inpaint("a cat", image=picture, mask_image=picture[:, :1], height=64, width=64, num_inference_steps=1)
