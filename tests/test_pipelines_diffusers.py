"""The pipelines are diffusers' pipelines: same pictures, same files, same tools around them."""

import json
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diptych.pipelines import (
    DiptychImg2ImgPipeline,
    DiptychInpaintPipeline,
    DiptychPipeline,
    DiptychUpscaler,
    DiptychXLImg2ImgPipeline,
    DiptychXLInpaintPipeline,
    DiptychXLPipeline,
)

PAIRS = [
    (DiptychPipeline, diffusers.StableDiffusionPipeline),
    (DiptychImg2ImgPipeline, diffusers.StableDiffusionImg2ImgPipeline),
    (DiptychInpaintPipeline, diffusers.StableDiffusionInpaintPipeline),
    (DiptychXLPipeline, diffusers.StableDiffusionXLPipeline),
    (DiptychXLImg2ImgPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
    (DiptychXLInpaintPipeline, diffusers.StableDiffusionXLInpaintPipeline),
]
SCHEDULERS = [
    diffusers.DDIMScheduler,
    diffusers.PNDMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.LCMScheduler,
]


def folder_for(cls: Any, tiny: Path, tiny_xl: Path) -> Path:
    return tiny_xl if "XL" in cls.__name__ else tiny


def task_arguments(cls: Any) -> dict[str, Any]:
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture, mask = Image.fromarray(colours), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    if "Inpaint" in cls.__name__:
        return {"image": picture, "mask_image": mask, "strength": 0.9, "width": 64, "height": 64}
    return {"image": picture, "strength": 0.9} if "Img2Img" in cls.__name__ else {}


def draw(pipeline: Any, **more: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    arguments = task_arguments(type(pipeline)) | {"num_inference_steps": 3, "output_type": "pt"} | more
    return pipeline("a red apple", generator=torch.Generator().manual_seed(5), **arguments).images


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return DiptychPipeline.from_pretrained(tiny_pipeline_folder)


@pytest.fixture(scope="module")
def xl_pipeline(tiny_xl_folder: Path) -> Any:
    return DiptychXLPipeline.from_pretrained(tiny_xl_folder)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: c.__name__)
def test_without_an_upscaler_pictures_are_bit_identical_to_those_of_diffusers(
    ours: Any, theirs: Any, scheduler: Any, pipeline: Any, xl_pipeline: Any
) -> None:
    parts = {**(xl_pipeline if "XL" in ours.__name__ else pipeline).components}
    parts.pop("upscaler")
    config = {**pipeline.scheduler.config, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    expected = draw(theirs(**{**parts, "scheduler": scheduler.from_config(config)}), num_inference_steps=5)
    made = draw(ours(**{**parts, "scheduler": scheduler.from_config(config)}, upscaler=None), num_inference_steps=5)
    assert torch.equal(made, expected)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda c: c.__name__)
def test_a_saved_folder_opens_with_diffusers_alone_and_its_upscaler_is_found_again(
    ours: Any, theirs: Any, tiny_pipeline_folder: Path, tiny_xl_folder: Path, tmp_path: Path
) -> None:
    folder = folder_for(ours, tiny_pipeline_folder, tiny_xl_folder)
    pipeline = ours.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == theirs.__name__
    assert torch.equal(draw(theirs.from_pretrained(tmp_path)), draw(pipeline))
    again = ours.from_pretrained(tmp_path)
    assert torch.equal(draw(again, upscale=4), draw(pipeline, upscale=4))


def test_a_folder_of_diffusers_without_an_upscaler_opens_and_is_saved_without_one(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder).save_pretrained(tmp_path / "plain")
    pipeline = DiptychPipeline.from_pretrained(tmp_path / "plain")
    assert pipeline.upscaler is None
    pipeline.save_pretrained(tmp_path / "ours")
    assert "upscaler" not in json.loads((tmp_path / "ours" / "model_index.json").read_text())


def test_from_pipe_keeps_every_component(pipeline: Any) -> None:
    other = DiptychImg2ImgPipeline.from_pipe(pipeline)
    assert all(other.components[name] is pipeline.components[name] for name in pipeline.components)
    plain = diffusers.StableDiffusionPipeline.from_pipe(pipeline)
    assert DiptychPipeline.from_pipe(plain, upscaler=pipeline.upscaler).upscaler is pipeline.upscaler


@pytest.mark.parametrize("upscale", [None, 4, 2.5, 0.5])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_output_type_has_the_same_picture(pipeline: Any, output_type: str, upscale: float | None) -> None:
    side = round(64 * (upscale or 1))
    picture = draw(pipeline, output_type=output_type, upscale=upscale)[0]
    exact = draw(pipeline, output_type="pt", upscale=upscale)[0].movedim(0, -1).numpy()
    if output_type == "pil":
        assert picture.size == (side, side)
        assert np.abs(np.asarray(picture) / 255 - exact).max() <= 0.501 / 255
    else:
        found = picture.movedim(0, -1).numpy() if output_type == "pt" else picture
        assert found.shape == (side, side, 3) and np.array_equal(found, exact)


def test_the_upscaler_is_given_the_decoded_picture_unrounded(pipeline: Any) -> None:
    decoded = draw(pipeline)
    assert not torch.equal(decoded, (decoded * 255).round() / 255)
    with torch.no_grad():
        expected = pipeline.upscaler(decoded).clamp(0, 1)
    assert torch.allclose(draw(pipeline, upscale=4), expected, atol=1e-6)


def test_latents_come_out_as_in_diffusers_and_cannot_be_enlarged(pipeline: Any) -> None:
    assert draw(pipeline, output_type="latent").shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="no picture to enlarge"):
        draw(pipeline, output_type="latent", upscale=4)


def test_a_tuple_comes_out_where_one_is_asked_for(pipeline: Any) -> None:
    images, flagged = pipeline("a cat", num_inference_steps=1, return_dict=False, output_type="pt", upscale=4)
    assert images.shape == (1, 3, 256, 256) and flagged is None


def test_upscaling_without_an_upscaler_is_refused(pipeline: Any) -> None:
    plain = DiptychPipeline(**{**pipeline.components, "upscaler": None})
    with pytest.raises(ValueError, match="this pipeline has none"):
        draw(plain, upscale=4)


@pytest.mark.parametrize("upscale", [0, -1, 65, float("nan")])
def test_an_upscale_that_makes_no_sense_is_refused(pipeline: Any, upscale: float) -> None:
    with pytest.raises(ValueError, match="upscale is"):
        draw(pipeline, upscale=upscale)


def test_callbacks_see_every_step_and_may_change_the_latents(pipeline: Any) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    changed = draw(pipeline, callback_on_step_end=callback)
    assert seen == [(i, (1, 4, 16, 16)) for i in range(3)]
    assert not torch.equal(changed, draw(pipeline))


def test_clip_skip_is_passed_on(pipeline: Any) -> None:
    assert not torch.equal(draw(pipeline, clip_skip=1), draw(pipeline))


def test_an_offloaded_pipeline_draws_and_enlarges_the_same_picture(tiny_pipeline_folder: Path) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    expected = draw(pipeline, upscale=4)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.upscaler, "_hf_hook")
    assert torch.equal(draw(pipeline, upscale=4), expected)
    assert torch.equal(draw(pipeline, upscale=4), expected)


def test_the_upscaler_runs_while_its_layers_are_fetched_one_by_one(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    # Sequential offload by way of the disk: accelerate cannot offload from a CPU to itself.
    upscaler = DiptychUpscaler.from_pretrained(tiny_pipeline_folder / "upscaler")
    picture = torch.rand(1, 3, 16, 16)
    expected = upscaler(picture)
    accelerate.disk_offload(upscaler, str(tmp_path), execution_device=torch.device("cpu"))
    assert upscaler.body[0].weight.is_meta
    assert torch.equal(upscaler(picture), expected)


def test_a_pipeline_whose_layers_are_all_fetched_one_by_one_draws_the_same_picture(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    expected = draw(pipeline, upscale=4)
    for name in ("text_encoder", "unet", "vae", "upscaler"):
        accelerate.disk_offload(pipeline.components[name], str(tmp_path / name), execution_device=torch.device("cpu"))
        assert next(pipeline.components[name].parameters()).is_meta
    assert torch.equal(draw(pipeline, upscale=4), expected)
    assert all(weight.is_meta for weight in pipeline.upscaler.parameters())  # and given back afterwards


@pytest.mark.parametrize("noise_device", ["cpu", "device"])
def test_noise_is_drawn_on_the_cpu_unless_the_device_is_asked_for(noise_device: str, pipeline: Any) -> None:
    class Elsewhere(DiptychPipeline):
        _execution_device = torch.device("meta")  # where no noise can be drawn

    pictures = pipeline("a cat", num_inference_steps=1, seed=3, noise_device=noise_device, output_type="pt").images
    expected = pipeline("a cat", num_inference_steps=1, seed=3, output_type="pt").images
    assert torch.equal(pictures, expected)  # the device of this pipeline is the CPU
    elsewhere = Elsewhere(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(RuntimeError, match="(?i)meta") as raised:
        elsewhere("a cat", num_inference_steps=1, seed=3, noise_device=noise_device)
    drawn_there = any(entry.name == "generators" for entry in raised.traceback)
    assert drawn_there == (noise_device == "device")


def test_textual_inversions_load_as_in_diffusers(tiny_pipeline_folder: Path) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.load_textual_inversion({"<thing>": torch.ones(2, 32)}, token="<thing>")
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(prompt, num_inference_steps=1, seed=1, output_type="pt").images for prompt in ("a <thing>", "a cat")
    ]
    assert not torch.equal(*pictures)


def test_a_controlnet_runs_on_the_components_as_in_diffusers(pipeline: Any) -> None:
    torch.manual_seed(0)
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16))
    controlled = diffusers.StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    controlled.set_progress_bar_config(disable=True)
    hint = Image.new("RGB", (32, 32), "white")
    made = controlled("a cat", image=hint, width=64, height=64, num_inference_steps=1, output_type="pt").images
    assert pipeline.upscale_pictures(made, 4).shape == (1, 3, 256, 256)


def test_an_ip_adapter_loads_as_in_diffusers(tiny_pipeline_folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=32,
        )
    )
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder, image_encoder=vision)
    weights: dict[str, Any] = {
        "image_proj": {"proj.weight": torch.randn(4 * 32, 32), "proj.bias": torch.zeros(4 * 32)}
        | {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)},
        "ip_adapter": {},
    }
    number = 1
    for name in pipeline.unet.attn_processors:
        if "attn2" in name:
            width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights["ip_adapter"][f"{number}.{part}.weight"] = torch.randn(width, 32) * 0.1
            number += 2
    pipeline.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    embeds = [torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))]
    pipeline.set_ip_adapter_scale(1.0)
    pictures = draw(pipeline, ip_adapter_image_embeds=embeds, upscale=4)
    pipeline.set_ip_adapter_scale(0.0)
    assert not torch.equal(pictures, draw(pipeline, ip_adapter_image_embeds=embeds, upscale=4))


def test_half_precision_keeps_the_upscaler_in_step(tiny_pipeline_folder: Path) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert isinstance(pipeline.upscaler, DiptychUpscaler) and pipeline.upscaler.dtype is torch.bfloat16
    assert draw(pipeline, upscale=4).dtype is torch.float32
