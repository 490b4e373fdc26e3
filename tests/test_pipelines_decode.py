"""Decodes that go wrong are found, repeated in fp32 and reported; every picture has noise of its own."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from diptych.errors import DiptychError
from diptych.pipelines import DiptychPipeline
from diptych.pipelines.decode import checked_decode
from diptych.pipelines.finish import generators

FP16_OVERFLOW = 3e5


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path) -> Any:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def overflowing(vae: Any) -> Any:
    """The VAE with a layer whose result is more than fp16 holds, and a next layer that takes it back."""
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(FP16_OVERFLOW)
        vae.decoder.conv_in.bias.mul_(FP16_OVERFLOW)
    return vae


def decode(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    notes: list[str] = []
    with torch.no_grad(), checked_decode(vae, notes):
        return vae.decode(latents, return_dict=False)[0], notes


def test_a_decode_that_overflows_in_half_precision_is_repeated_in_fp32_and_reported(pipeline: Any) -> None:
    vae, latents = overflowing(pipeline.vae), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, silence = decode(vae, latents)
    assert silence == []
    vae.half()
    with torch.no_grad():
        assert not torch.isfinite(vae.decode(latents.half(), return_dict=False)[0]).all()
    picture, notes = decode(vae, latents.half())
    assert notes == ["the decode in float16 gave 2 pictures black or NaN: decoded again in fp32"]
    assert torch.allclose(picture.float(), expected, atol=0.02)
    assert vae.dtype is torch.float16 and "decode" not in vars(vae)


def test_a_vae_whose_weights_are_offloaded_is_fetched_for_the_repetition(pipeline: Any, tmp_path: Path) -> None:
    vae, latents = overflowing(pipeline.vae), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, _ = decode(vae, latents)
    vae.half()
    accelerate.disk_offload(vae, str(tmp_path), execution_device=torch.device("cpu"))
    assert vae.decoder.conv_in.weight.is_meta
    picture, notes = decode(vae, latents.half())
    assert len(notes) == 1 and torch.allclose(picture.float(), expected, atol=0.02)
    assert vae.decoder.conv_in.weight.is_meta


def test_a_black_decode_is_repeated_and_reported(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(-2)
    pipeline.vae.to(torch.bfloat16)
    _, notes = decode(pipeline.vae, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16))
    assert notes == [
        "the decode in bfloat16 gave one picture black or NaN: decoded again in fp32",
        "one picture all black, in fp32 too",
    ]


def test_a_picture_that_stays_nan_is_an_error(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(DiptychError, match="VAE gives NaN even in fp32"):
        pipeline("a cat", num_inference_steps=1)


def test_nan_from_the_denoising_is_an_error_that_says_so(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(DiptychError, match="denoising gave NaN"):
        pipeline("a cat", num_inference_steps=1)


def test_a_pipeline_reports_in_its_notes_and_only_on_its_last_call(pipeline: Any) -> None:
    overflowing(pipeline.vae).half()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def draw() -> None:
        pipeline.unet.half()
        pipeline.text_encoder.half()
        pipeline("a cat", latents=latents.half(), num_inference_steps=1, output_type="pt", upscale=4)

    draw()
    draw()
    assert len(pipeline.notes) == 1 and "decoded again in fp32" in pipeline.notes[0]


def test_a_list_of_seeds_gives_each_picture_the_noise_it_has_alone(pipeline: Any) -> None:
    noise: list[torch.Tensor] = []
    real = pipeline.prepare_latents

    def spying(*args: Any, **kwargs: Any) -> torch.Tensor:
        noise.append(real(*args, **kwargs))
        return noise[-1]

    pipeline.prepare_latents = spying
    arguments = {"num_inference_steps": 3, "output_type": "pt", "upscale": 4}
    batch = pipeline("a cat", seed=[7, 3, 11], **arguments).images
    alone = torch.cat([pipeline("a cat", seed=seed, **arguments).images for seed in (7, 3, 11)])
    assert torch.equal(noise[0], torch.cat(noise[1:]))
    assert (batch - alone).abs().max() <= 1 / 255


def test_one_seed_counts_up_over_a_batch(pipeline: Any) -> None:
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    counted = pipeline("a cat", seed=5, num_images_per_prompt=2, **arguments).images
    named = pipeline("a cat", seed=[5, 6], **arguments).images
    prompts = pipeline(["a cat", "a cat"], seed=5, **arguments).images
    assert torch.equal(counted, named) and torch.equal(prompts, named)


def test_schedulers_with_noise_of_their_own_draw_it_for_each_picture(pipeline: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    batch = pipeline("a cat", seed=[1, 2], **arguments).images
    assert (batch[1:] - pipeline("a cat", seed=2, **arguments).images).abs().max() <= 1 / 255


@pytest.mark.parametrize("seeds", [[1, 2], [], [1, 2, 3, 4]])
def test_a_number_of_seeds_that_does_not_fit_is_refused(pipeline: Any, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="one seed, or one for each"):
        pipeline(["a", "b", "c"], seed=seeds, num_inference_steps=1)


def test_a_seed_and_a_generator_together_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        pipeline("a", seed=1, generator=torch.Generator(), num_inference_steps=1)


def test_generators_are_independent_of_each_other() -> None:
    first, second = generators([1, 2])
    assert torch.equal(torch.randn(3, generator=second), torch.randn(3, generator=generators([2])[0]))
    assert not torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=generators([2])[0]))
