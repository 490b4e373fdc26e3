"""Checkpoints in one file: written here from known models in the original key layout, and read back."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import original_layout
from benchmarks.original_layout import Weights
from diptych.errors import CheckpointError, DiptychError, ModelNotFound, UnknownArchitecture
from diptych.pipelines import DiptychInpaintPipeline, DiptychPipeline, DiptychXLPipeline
from diptych.pipelines.families import SD1, SD2, SDXL, predicts_v, recognise
from diptych.pipelines.single_file import load_vae
from diptych.pipelines.tokenizer import clip_tokenizer


def original(pipeline: Any, family: str) -> Weights:
    return {key: weight.clone() for key, weight in original_layout.original(pipeline, family).items()}


def same_weights(first: Any, second: Any) -> bool:
    models = [
        name for name, part in first.components.items() if isinstance(part, torch.nn.Module) and name != "upscaler"
    ]
    for name in models:
        one, other = first.components[name].state_dict(), second.components[name].state_dict()
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return bool(models)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return DiptychPipeline.from_pretrained(tiny_pipeline_folder)


@pytest.fixture
def contiguous_sd1(pipeline: Any) -> Weights:
    return {key: weight.contiguous() for key, weight in original(pipeline, "sd1").items()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection is a failure."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a checkpoint file was loaded by way of the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_safetensors_file_gives_back_the_weights_that_were_written(
    family: str, pipeline: Any, tiny_xl_folder: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    cls: Any = DiptychXLPipeline if family == "sdxl" else DiptychPipeline
    known = cls.from_pretrained(tiny_xl_folder) if family == "sdxl" else pipeline
    file = tmp_path / "model.safetensors"
    save_file({key: weight.contiguous() for key, weight in original(known, family).items()}, file)
    folder = tiny_xl_folder if family == "sdxl" else tiny_pipeline_folder
    assert same_weights(cls.from_single_file(file, config=folder), known)


def test_an_old_ckpt_with_lightning_objects_inside_is_read_as_data(
    pipeline: Any, contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    exec("class ModelCheckpoint:\n    pass", module.__dict__)
    path = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    sys.modules |= {name: types.ModuleType(name) for name in path} | {module.__name__: module}
    try:
        callback = module.ModelCheckpoint()
        callback.monitor = "val/loss"
        content = {"epoch": 3, "global_step": 470000, "callbacks": {type(callback): callback}}
        torch.save({**content, "state_dict": contiguous_sd1}, tmp_path / "model.ckpt")
    finally:
        for name in [*path, module.__name__]:
            del sys.modules[name]
    read = DiptychPipeline.from_single_file(tmp_path / "model.ckpt", config=tiny_pipeline_folder)
    assert same_weights(read, pipeline)


def test_names_of_the_text_encoder_that_lack_a_level_are_read(
    pipeline: Any, contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    short = {key.replace("transformer.text_model.", "transformer."): w for key, w in contiguous_sd1.items()}
    save_file(short, tmp_path / "m.safetensors")
    read = DiptychPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)
    assert same_weights(read, pipeline)


def test_weights_come_in_the_precision_that_is_asked_for_and_given_components_are_kept(
    pipeline: Any, contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_file(contiguous_sd1, tmp_path / "m.safetensors")
    read = DiptychPipeline.from_single_file(
        tmp_path / "m.safetensors",
        config=tiny_pipeline_folder,
        torch_dtype=torch.bfloat16,
        scheduler=pipeline.scheduler,
        upscaler=pipeline.upscaler,
    )
    assert {read.unet.dtype, read.vae.dtype, read.text_encoder.dtype} == {torch.bfloat16}
    assert read.scheduler is pipeline.scheduler and read.upscaler is pipeline.upscaler


def test_an_inpainting_model_is_recognised(
    contiguous_sd1: Weights, pipeline: Any, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    weights = {key: w.contiguous() for key, w in (contiguous_sd1 | original_layout.original_unet(unet)).items()}
    save_file(weights, tmp_path / "m.safetensors")
    read = DiptychInpaintPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)
    assert read.unet.config.in_channels == 9
    with pytest.raises(UnknownArchitecture, match="is an inpainting model"):
        DiptychPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)


@pytest.mark.parametrize("layout", ["original", "diffusers", "within a checkpoint"])
def test_a_vae_file_gives_back_its_weights_and_takes_its_scaling_from_the_model(
    layout: str, pipeline: Any, contiguous_sd1: Weights, tmp_path: Path
) -> None:
    plain = {key: weight.contiguous() for key, weight in original_layout.original_vae(pipeline.vae).items()}
    weights = {"original": plain, "diffusers": pipeline.vae.state_dict(), "within a checkpoint": contiguous_sd1}[layout]
    save_file(weights, tmp_path / "vae.safetensors")
    vae = load_vae(tmp_path / "vae.safetensors", pipeline.vae)
    assert all(torch.equal(vae.state_dict()[key], weight) for key, weight in pipeline.vae.state_dict().items())
    assert vae.config.scaling_factor == pipeline.vae.config.scaling_factor


@pytest.mark.parametrize(
    ("marks", "expected"), [({}, "epsilon"), ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "v_prediction")]
)
def test_marks_in_the_file_say_what_the_model_predicts(
    marks: Weights, expected: str, contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_file(contiguous_sd1 | marks, tmp_path / "m.safetensors")
    read = DiptychPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)
    assert read.scheduler.config.prediction_type == expected


def test_a_yaml_file_beside_the_checkpoint_says_what_it_predicts(
    contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_file(contiguous_sd1, tmp_path / "m.safetensors")
    (tmp_path / "m.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    read = DiptychPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)
    assert read.scheduler.config.prediction_type == "v_prediction"


class Predicts(torch.nn.Module):
    """A UNet that is perfect at the last timestep, where its input is noise: it says what it was asked to predict."""

    def __init__(self, v: bool) -> None:
        super().__init__()
        self.v = v
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        picture = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
        return (0.068 * sample - picture if self.v else sample,)


@pytest.mark.parametrize("v", [True, False])
def test_a_unet_is_asked_what_it_predicts_where_nothing_says_so(v: bool) -> None:
    assert predicts_v(Predicts(v), 1024) is v


UNET = "model.diffusion_model."


def unet_keys(channels: int = 4, width: int = 768, **more: torch.Tensor) -> Weights:
    attention = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return {UNET + "input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3), attention: torch.zeros(8, width)} | more


@pytest.mark.parametrize(("width", "family"), [(768, SD1), (1024, SD2), (2048, SDXL)])
@pytest.mark.parametrize("channels", [4, 9])
def test_a_unet_alone_tells_its_family(width: int, family: Any, channels: int) -> None:
    assert recognise(unet_keys(channels, width)) == (family, channels == 9)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({UNET + "joint_blocks.0.x": torch.zeros(1)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, "Flux"),
        ({UNET + "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, "Flux"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "--lora"),
        ({"control_model.time_embed.0.weight": torch.zeros(1)}, "ControlNet"),
        ({"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, "--vae"),
        ({"body.0.weight": torch.zeros(1)}, "--upscaler"),
        ({"string_to_param": torch.zeros(1)}, "textual inversion"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "whole folder"),
        ({"something": torch.zeros(1)}, "no known model"),
        (unet_keys(8), "InstructPix2Pix"),
        (unet_keys(7), "x4 upscaler"),
        (unet_keys(5), "depth"),
        (unet_keys(16), "16 channels"),
        (unet_keys(width=1280), "1280"),
        (unet_keys(**{"conditioner.embedders.0.model.x": torch.zeros(1)}), "refiner"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(weights: Weights, said: str) -> None:
    with pytest.raises(UnknownArchitecture, match=said):
        recognise(weights)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("first_stage_model.", "no VAE inside"),
        ("cond_stage_model.", "text embeddings of 32 numbers"),
        (UNET + "out.", "weights are missing"),
    ],
)
def test_a_missing_component_is_named(
    prefix: str, said: str, contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_file({k: w for k, w in contiguous_sd1.items() if not k.startswith(prefix)}, tmp_path / "m.safetensors")
    with pytest.raises(DiptychError, match=f"m.safetensors.*{said}"):
        DiptychPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)


def test_a_text_encoder_that_is_not_in_the_file_is_named(pipeline: Any, tmp_path: Path) -> None:
    save_file(unet_keys(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors.*no text_encoder inside"):
        DiptychPipeline.from_single_file(tmp_path / "m.safetensors", unet=pipeline.unet, vae=pipeline.vae)


def test_a_file_of_another_shape_than_its_family_is_refused(contiguous_sd1: Weights, tmp_path: Path) -> None:
    save_file(contiguous_sd1, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors"):
        DiptychPipeline.from_single_file(tmp_path / "m.safetensors")  # the family's own, full-size configurations


def test_a_file_of_another_class_is_refused(
    contiguous_sd1: Weights, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    save_file(contiguous_sd1, tmp_path / "m.safetensors")
    with pytest.raises(UnknownArchitecture, match="Stable Diffusion 1.x: DiptychXLPipeline cannot draw it"):
        DiptychXLPipeline.from_single_file(tmp_path / "m.safetensors", config=tiny_pipeline_folder)


def test_a_truncated_file_is_refused(contiguous_sd1: Weights, tmp_path: Path) -> None:
    save_file(contiguous_sd1, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="m.safetensors"):
        DiptychPipeline.from_single_file(tmp_path / "m.safetensors")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((ModelNotFound, CheckpointError), match="nothing.safetensors"):
        DiptychPipeline.from_single_file(tmp_path / "nothing.safetensors")


def test_the_tokenizer_is_clips_own() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip_tokenizer("!").pad_token_id == 0


@pytest.mark.parametrize(
    ("family", "part", "cls", "parameters"),
    [
        (SD1, "unet", UNet2DConditionModel, 859_520_964),
        (SD2, "unet", UNet2DConditionModel, 865_910_724),
        (SDXL, "unet", UNet2DConditionModel, 2_567_463_684),
        (SD1, "vae", AutoencoderKL, 83_653_863),
        (SD2, "vae", AutoencoderKL, 83_653_863),
        (SDXL, "vae", AutoencoderKL, 83_653_863),
        (SD1, "text_encoder", CLIPTextModel, 123_060_480),
        (SD2, "text_encoder", CLIPTextModel, 340_387_840),
        (SDXL, "text_encoder", CLIPTextModel, 123_060_480),
        (SDXL, "text_encoder_2", CLIPTextModelWithProjection, 694_659_840),
    ],
)
def test_the_configurations_make_models_of_the_published_size(
    family: Any, part: str, cls: Any, parameters: int
) -> None:
    folder = family.config / part
    with torch.device("meta"):
        is_clip = part.startswith("text")
        config = CLIPTextConfig.from_pretrained(folder) if is_clip else cls.load_config(folder)
        model = cls(config) if is_clip else cls.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
