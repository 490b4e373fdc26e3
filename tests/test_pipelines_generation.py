"""From a request to finished pictures."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image

from diptych.errors import Cancelled, CheckpointError, ModelNotFound, UnknownArchitecture
from diptych.infotext import Infotext, parse_infotext
from diptych.pipelines.encoding import encode_prompts
from diptych.pipelines.generation import GenerationRequest, _settings, generate, plan_sizes, unknown_words
from diptych.pipelines.loading import load_pipeline
from diptych.pipelines.loras import find_lora
from diptych.pipelines.prompts import parse_prompt
from diptych.pipelines.recall import request_fields
from diptych.pipelines.schedulers import SAMPLERS, SCHEDULE_TYPES, make_scheduler, sampler_name


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def xl_pipeline(tiny_xl_folder: Path) -> Any:
    return load_pipeline(tiny_xl_folder, device="cpu", dtype="fp32")


def request(prompt: str = "a red apple", **more: Any) -> GenerationRequest:
    return GenerationRequest(prompt, **{"steps": 3, "seed": 1, "upscale": 1, **more})


def draw(pipeline: Any, *args: Any, **more: Any) -> np.ndarray:
    (picture,) = generate(pipeline, request(*args, **more))
    return np.asarray(picture.image).astype(int)


# Prompts


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_a_plain_prompt_is_encoded_as_diffusers_does(pipeline: Any, clip_skip: int) -> None:
    encoded = encode_prompts(pipeline, parse_prompt("a red apple"), parse_prompt("cat"), 2, clip_skip)
    positive, negative = pipeline.encode_prompt("a red apple", "cpu", 1, True, "cat", clip_skip=clip_skip - 1 or None)
    assert torch.equal(encoded.steps[0].prompt, positive)
    assert clip_skip > 1 or torch.equal(encoded.steps[0].negative, negative)
    assert encoded.steps[0] is encoded.steps[1]


@pytest.mark.parametrize("negative", ["", "cat"])
def test_sdxl_prompts_are_encoded_as_diffusers_does(xl_pipeline: Any, negative: str) -> None:
    made = encode_prompts(xl_pipeline, parse_prompt("a red apple"), parse_prompt(negative), 1).steps[0]
    expected = xl_pipeline.encode_prompt("a red apple", device="cpu", negative_prompt=negative or None)
    found = (made.prompt, made.negative, made.pooled, made.negative_pooled)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_multiply_the_embeddings_of_their_words(pipeline: Any) -> None:
    plain = encode_prompts(pipeline, parse_prompt("a red apple"), parse_prompt(""), 1).steps[0].prompt
    heavy = encode_prompts(pipeline, parse_prompt("a (red:1.5) apple"), parse_prompt(""), 1).steps[0].prompt
    ratio = (heavy / plain)[0].median(dim=1).values  # start, a, red, apple, end, ...
    assert torch.allclose(ratio[2] / ratio[1], torch.tensor(1.5), atol=1e-3)
    assert 1 / 1.5 <= ratio[1] <= 1


def test_weights_keep_the_mean_of_an_embedding_that_has_one(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32")
    with torch.no_grad():
        pipeline.text_encoder.get_submodule("final_layer_norm").bias.fill_(-3)
    prompts = [parse_prompt(text) for text in ("a red apple", "a (red:1.5) apple")]
    means = [encode_prompts(pipeline, prompt, parse_prompt(""), 1).steps[0].prompt.mean() for prompt in prompts]
    assert torch.allclose(*means, atol=1e-4)


@pytest.mark.parametrize("steps", [3, 25])
def test_karras_sigmas_work_with_zero_terminal_snr(steps: int, pipeline: Any) -> None:
    assert draw(pipeline, scheduler="DPM++ 2M Karras", steps=steps).shape == (64, 64, 3)


def test_long_prompts_are_read_in_chunks_that_end_at_commas(pipeline: Any) -> None:
    words = "a " * 70 + ", " + "a " * 20
    encoded = encode_prompts(pipeline, parse_prompt(words), parse_prompt("cat"), 1)
    assert (encoded.tokens, encoded.chunks) == (91, 2)
    assert encoded.steps[0].prompt.shape == encoded.steps[0].negative.shape == (1, 154, 32)
    parts = [
        encode_prompts(pipeline, parse_prompt(t), parse_prompt(""), 1).steps[0].prompt
        for t in ("a " * 70 + ",", "a " * 20)
    ]
    assert torch.allclose(encoded.steps[0].prompt, torch.cat(parts, 1), atol=1e-6)


def test_break_begins_a_new_chunk(pipeline: Any) -> None:
    assert encode_prompts(pipeline, parse_prompt("a BREAK b BREAK c"), parse_prompt(""), 1).chunks == 3


def test_a_long_prompt_is_drawn_and_said(pipeline: Any) -> None:
    (picture,) = generate(pipeline, request("a red apple " * 40))
    assert any("read in 2 pieces" in note for note in picture.notes)


def edited(pipeline: Any) -> None:
    first, late, never = (draw(pipeline, p, steps=4) for p in ("cat", "[cat:apple:0.5]", "[cat:apple:4]"))
    assert np.array_equal(first, never) and not np.array_equal(first, late)


def test_an_edit_changes_the_prompt_between_steps(pipeline: Any) -> None:
    edited(pipeline)


def test_an_edit_changes_the_prompt_between_steps_of_sdxl(xl_pipeline: Any) -> None:
    edited(xl_pipeline)


def test_words_that_the_model_was_never_shown_are_named(pipeline: Any) -> None:
    assert unknown_words(pipeline, "a red zebra, <lora:x:1> Apple qux") == [
        "this model was never shown the words 'zebra', 'qux'"
    ]
    assert unknown_words(pipeline, "a (red:1.2) apple") == []


# Sizes


@pytest.mark.parametrize(
    ("fields", "denoised", "final"),
    [
        ({"upscale": None}, (64, 64), (256, 256)),
        ({"upscale": 1}, (64, 64), (64, 64)),
        ({"width": 96, "height": 64}, (96, 64), (96, 64)),
        ({"width": 96, "height": 64, "upscale": 4}, (96, 64), (384, 256)),
        ({"width": 256, "height": 256, "upscale": None}, (64, 64), (256, 256)),
        ({"width": 256, "height": 128}, (88, 48), (256, 128)),
        ({"width": 500, "height": 300, "upscale": 2}, (80, 48), (1000, 600)),
        ({"width": 70, "height": 61}, (72, 64), (72, 64)),
        ({"width": 128}, (88, 48), (128, 64)),
    ],
)
def test_size_is_the_picture_before_upscaling_and_the_gan_makes_up_what_the_model_was_not_made_for(
    pipeline: Any, fields: dict[str, Any], denoised: tuple[int, int], final: tuple[int, int]
) -> None:
    plan = plan_sizes(pipeline, request(**fields))
    assert (plan.denoised, plan.final) == (denoised, final)


def test_pictures_have_the_size_that_was_planned_and_say_both_sizes(pipeline: Any) -> None:
    (picture,) = generate(pipeline, request(width=200, height=90, upscale=2))
    assert picture.image.size == (400, 180)
    assert picture.settings["Size"] == "200x90" and picture.settings["Denoised size"] == "96x40"
    assert picture.settings["Postprocess upscale by"] == "2"


def test_a_size_that_is_rounded_is_said(pipeline: Any) -> None:
    assert plan_sizes(pipeline, request(width=70, height=61)).notes == [
        "the size 70x61 was rounded to 72x64: sides are multiples of 8"
    ]


def test_without_an_upscaler_the_model_draws_what_was_asked_for(pipeline: Any) -> None:
    plain = type(pipeline)(**{**pipeline.components, "upscaler": None}, requires_safety_checker=False)
    assert plan_sizes(plain, request(width=256, height=256)).denoised == (256, 256)
    assert plan_sizes(plain, request(upscale=None)).final == (64, 64)
    with pytest.raises(ValueError, match="has no upscaler"):
        plan_sizes(plain, request(upscale=2))


# Pictures


def test_pictures_have_seeds_that_count_up_and_do_not_depend_on_the_batch(pipeline: Any) -> None:
    together = list(generate(pipeline, request(count=3, batch_size=2, seed=2**32 - 2)))
    assert [picture.seed for picture in together] == [2**32 - 2, 2**32 - 1, 0]
    alone = draw(pipeline, seed=2**32 - 1)
    assert np.abs(np.asarray(together[1].image).astype(int) - alone).max() <= 1


def test_a_missing_seed_is_drawn_and_told(pipeline: Any) -> None:
    first, second = (next(generate(pipeline, request(seed=None))).seed for _ in range(2))
    assert first != second


def test_the_infotext_draws_the_same_picture_again(pipeline: Any) -> None:
    (picture,) = generate(
        pipeline, request("a (red:1.2) apple", negative_prompt="cat", scheduler="DPM++ 2M Karras", upscale=2, width=128)
    )
    fields, notes = request_fields(parse_infotext(picture.infotext))
    assert notes == []
    (again,) = generate(pipeline, GenerationRequest(**fields))
    assert np.array_equal(np.asarray(again.image), np.asarray(picture.image)) and again.infotext == picture.infotext


@pytest.mark.parametrize("noise_device", ["cpu", "device"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_infotext_says_where_the_noise_was_drawn(device: str, noise_device: str, pipeline: Any) -> None:
    class Elsewhere(type(pipeline)):  # type: ignore[misc]
        _execution_device = torch.device(device)  # meta: stands for whatever is no CPU

    asked = request(noise_device=noise_device)
    there = Elsewhere(**pipeline.components, requires_safety_checker=False)
    settings = _settings(there, asked, plan_sizes(there, asked), None, 1)
    on_gpu = device == "meta" and noise_device == "device"
    assert settings["RNG"] == ("GPU" if on_gpu else "CPU")  # as Automatic1111 understands it
    fields, notes = request_fields(Infotext("", "", settings))
    assert fields.get("noise_device", "cpu") == ("device" if on_gpu else "cpu")
    assert any("drawn on a GPU" in note for note in notes) is on_gpu


def test_beginning_from_a_picture_keeps_it_the_more_the_less_strength_there_is(pipeline: Any) -> None:
    init = Image.new("RGB", (64, 64), (200, 30, 30))
    far = [np.abs(draw(pipeline, init_image=init, strength=s, steps=10) - np.asarray(init)).mean() for s in (0.1, 1.0)]
    assert far[0] != far[1]
    assert next(generate(pipeline, request(init_image=init))).settings["Denoising strength"] == "0.75"


def test_what_a_mask_keeps_is_kept_exactly(pipeline: Any) -> None:
    init = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    made = draw(pipeline, init_image=init, mask=mask)
    assert np.array_equal(made[:, 32:], np.asarray(init)[:, 32:])
    assert not np.array_equal(made[:, :32], np.asarray(init)[:, :32])


def test_sdxl_draws_from_text_pictures_and_masks(xl_pipeline: Any) -> None:
    init = Image.new("RGB", (64, 64), "red")
    tasks: list[dict[str, Any]] = [
        {"upscale": 4},
        {"init_image": init},
        {"init_image": init, "mask": Image.new("L", (64, 64), 255)},
    ]
    assert [draw(xl_pipeline, **task).shape[0] for task in tasks] == [256, 64, 64]


def test_progress_goes_up_to_its_total_and_previews_are_pictures(pipeline: Any) -> None:
    told: list[tuple[int, int]] = []
    shown: list[list[Image.Image]] = []
    asked = request(count=2, steps=4, upscale=4)
    list(generate(pipeline, asked, progress=lambda *at: told.append(at), preview=shown.append, preview_every=2))
    assert told == sorted(told) and told[-1] == (12, 12) and {total for _, total in told} == {12}
    assert [[picture.size for picture in pictures] for pictures in shown] == [[(64, 64)], [(64, 64)]]


def test_a_preview_has_the_colours_of_the_latents(pipeline: Any) -> None:
    from diptych.pipelines.preview import LatentPreview

    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    with torch.no_grad():
        latents = pipeline.vae.encode(red * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert LatentPreview(pipeline).pictures(latents, (32, 48))[0].size == (32, 48)


@pytest.mark.parametrize("after", [0, 2])
def test_a_cancelled_request_stops_within_one_step(pipeline: Any, after: int) -> None:
    cancel, told = threading.Event(), []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if done == after:
            cancel.set()

    with pytest.raises(Cancelled):
        list(generate(pipeline, request(steps=50), progress=progress, cancel=cancel))
    assert max(told) <= after + 1
    assert draw(pipeline).shape == (64, 64, 3)


# Schedulers


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.name)
def test_every_sampler_of_the_table_is_made_and_named_again(sampler: Any, pipeline: Any) -> None:
    config = {**pipeline.scheduler.config, "prediction_type": "epsilon"}
    scheduler, _ = make_scheduler(sampler.name.lower(), config)
    assert type(scheduler).__name__ == sampler.class_name
    assert sampler_name(scheduler) == (sampler.name, "Automatic")
    assert type(make_scheduler(sampler.class_name, config)[0]).__name__ == sampler.class_name


@pytest.mark.parametrize("name", ["Euler", "Euler a", "LMS", "DPM++ 2M"])
def test_a_single_step_begins_at_the_noise(name: str) -> None:
    scheduler, _ = make_scheduler(name, PNDMScheduler(beta_schedule="scaled_linear").config)  # Stable Diffusion 1.x
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999] and scheduler.sigmas[0] == scheduler.sigmas.max() > 1
    assert scheduler.config.timestep_spacing == "linspace"


@pytest.mark.parametrize("kind", SCHEDULE_TYPES)
def test_schedule_types_are_understood_as_a_last_word(kind: str, pipeline: Any) -> None:
    scheduler, _ = make_scheduler(f"DPM++ 2M {kind}", {**pipeline.scheduler.config, "prediction_type": "epsilon"})
    assert all(scheduler.config[key] == value for key, value in SCHEDULE_TYPES[kind].items())


def test_what_a_scheduler_cannot_keep_is_said(pipeline: Any) -> None:
    _, notes = make_scheduler("LMS", pipeline.scheduler.config)
    assert "zero terminal SNR" in notes[0]
    assert make_scheduler("DDIM", pipeline.scheduler.config)[1] == []


@pytest.mark.parametrize("name", ["Euler b", "", "DDIM Karras", "AutoencoderKL"])
def test_an_unknown_scheduler_is_refused_with_names_that_are_near(name: str, pipeline: Any) -> None:
    with pytest.raises(ValueError, match="no scheduler called|no schedule type"):
        make_scheduler(name, pipeline.scheduler.config)


# LoRAs


def kohya_lora(pipeline: Any, width: int | None = None, value: float = 1.0) -> dict[str, torch.Tensor]:
    weights = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            key = "lora_unet_" + name.replace(".", "_")
            weights[f"{key}.lora_down.weight"] = torch.full((2, width or module.in_features), value)
            weights[f"{key}.lora_up.weight"] = torch.full((module.out_features, 2), 0.1)
            weights[f"{key}.alpha"] = torch.tensor(2.0)
    return weights


@pytest.fixture
def loras(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from safetensors.torch import save_file

    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(kohya_lora(pipeline), folder / "one.safetensors")
    save_file(kohya_lora(pipeline, value=-0.5), folder / "two.safetensors")
    save_file(kohya_lora(pipeline, width=2048), folder / "xl.safetensors")
    save_file(kohya_lora(pipeline, value=float("nan")), folder / "nan.safetensors")
    save_file({"x.hada_w1_a": torch.ones(1)}, folder / "loha.safetensors")
    save_file({"transformer.single_transformer_blocks.0.lora_A.weight": torch.ones(1)}, folder / "flux.safetensors")
    return folder


def test_loras_act_with_their_weights_and_leave_nothing_behind(pipeline: Any, loras: Path) -> None:
    plain = draw(pipeline)
    one = draw(pipeline, "a red apple <lora:one:1>")
    both = draw(pipeline, loras=[(str(loras / "one.safetensors"), 1.0), (str(loras / "two.safetensors"), 0.5)])
    assert not np.array_equal(plain, one) and not np.array_equal(one, both)
    assert np.array_equal(draw(pipeline, loras=[(str(loras / "one.safetensors"), 1.0)]), one)
    assert np.array_equal(draw(pipeline, "a red apple <lora:one:0>"), plain)
    assert np.array_equal(draw(pipeline), plain)


def test_a_lora_of_peft_is_the_same_lora_as_kohyas_and_the_text_encoder_has_its_own(pipeline: Any, loras: Path) -> None:
    from safetensors.torch import save_file

    peft = {}
    for name, module in pipeline.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            peft[f"unet.{name}.lora_A.weight"] = torch.full((2, module.in_features), 1.0)
            peft[f"unet.{name}.lora_B.weight"] = torch.full((module.out_features, 2), 0.1)
    save_file(peft, loras / "peft.safetensors")
    assert np.array_equal(draw(pipeline, "a <lora:peft:0.8>"), draw(pipeline, "a <lora:one:0.8>"))
    text = {}
    for part in ("q", "k", "v", "out"):
        key = f"lora_te_text_model_encoder_layers_0_self_attn_{part}_proj"
        text |= {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
        text[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(text, loras / "text.safetensors")
    assert not np.array_equal(draw(pipeline, "a <lora:text:1>"), draw(pipeline, "a"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("xl", "is for SDXL, and this model is"), ("nan", "NaN"), ("loha", "LyCORIS"), ("flux", "is for Flux")],
)
def test_a_lora_that_does_not_fit_is_named_and_refused(name: str, said: str, pipeline: Any, loras: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.safetensors.*{said}"):
        draw(pipeline, loras=[(str(loras / f"{name}.safetensors"), 1.0)])


def test_a_lora_that_is_not_there_is_named_and_one_outside_of_the_folder_is_not_found(loras: Path) -> None:
    with pytest.raises(ModelNotFound, match="did you mean one"):
        find_lora("onee")
    with pytest.raises(ModelNotFound, match="no LoRA called"):
        find_lora("../loras/one")


# Bad input


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -5}, "steps is -5"),
        ({"count": 0}, "count is 0"),
        ({"guidance_scale": float("nan")}, "guidance scale is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"upscale": 0}, "upscale is 0"),
        ({"width": 3}, "width is 3"),
        ({"clip_skip": 0}, "clip skip is 0"),
        ({"noise_device": "moon"}, "noise device"),
        ({"mask": Image.new("L", (8, 8))}, "give the picture too"),
        ({"mask": Image.new("L", (8, 8)), "init_image": Image.new("RGB", (9, 8))}, "mask is 8x8, the picture 9x8"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        request(**fields)


def test_too_little_strength_and_too_much_clip_skip_are_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="leaves no step"):
        draw(pipeline, init_image=Image.new("RGB", (64, 64)), strength=0.1)
    with pytest.raises(ValueError, match="has 3 layers"):
        draw(pipeline, clip_skip=4)


def test_requests_can_be_changed_field_by_field() -> None:
    assert dataclasses.replace(request(), steps=9).steps == 9


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dtype": "fp16"}, ValueError, "fp16 is for GPUs"),
        ({"attention": "magic"}, ValueError, "no attention called"),
        ({"attention": "xformers"}, ValueError, "no operator for cpu"),
        ({"upscaler": "no-such-upscaler"}, ModelNotFound, "no-such-upscaler"),
        ({"model": "no/such/model"}, ModelNotFound, "no/such/model"),
        ({"model": "nothing.safetensors"}, ModelNotFound, "nothing.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    arguments: dict[str, Any], error: Any, said: str, tiny_pipeline_folder: Path
) -> None:
    with pytest.raises(error, match=said):
        load_pipeline(**{"model": tiny_pipeline_folder, "device": "cpu", **arguments})


def test_folders_and_files_that_are_no_models_are_said(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ModelNotFound, match="no model_index.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline, which is not supported"):
        load_pipeline(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="is no model"):
        load_pipeline(tmp_path / "text.txt")
    (tmp_path / "upscaler.safetensors").write_bytes(
        (tiny_pipeline_folder / "upscaler/diffusion_pytorch_model.safetensors").read_bytes()
    )
    with pytest.raises(UnknownArchitecture, match="--upscaler"):
        load_pipeline(tmp_path / "upscaler.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline_folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="broken cannot be loaded"):
        load_pipeline(broken, device="cpu")
    shutil.rmtree(broken / "unet")
    with pytest.raises(CheckpointError, match="broken lacks its unet: there is no folder .*broken/unet"):
        load_pipeline(broken, device="cpu")


def test_nan_weights_are_named(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from diptych.pipelines import DiptychPipeline

    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] = float("nan")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'conv_in.bias' of its unet holds NaN"):
        load_pipeline(tmp_path, device="cpu", dtype="fp32")


def test_an_upscaler_and_a_vae_from_files_take_the_place_of_the_models_own(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from diptych.upscalers.networks import SRVGGNetCompact

    save_file(SRVGGNetCompact(num_feat=8, num_conv=1, upscale=2).state_dict(), tmp_path / "x2.safetensors")
    vae = tiny_pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors"
    pipeline = load_pipeline(
        tiny_pipeline_folder, device="cpu", dtype="bf16", upscaler=tmp_path / "x2.safetensors", vae=vae
    )
    assert pipeline.upscaler.network.scale == 2 and pipeline.upscaler.dtype is torch.bfloat16
    assert next(generate(pipeline, request(upscale=None))).image.size == (128, 128)
