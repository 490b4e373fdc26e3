"""What makes pictures fast: texts encoded once, the layout, attention and compilation that were asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from PIL import Image

from diptych.pipelines import encoding
from diptych.pipelines.encoding import encode_prompts
from diptych.pipelines.generation import GenerationRequest, generate
from diptych.pipelines.loading import load_pipeline
from diptych.pipelines.prompts import parse_prompt


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32")


@pytest.fixture
def encoder_runs(pipeline: Any) -> list[int]:
    """Grows by one whenever the text encoder runs."""
    runs: list[int] = []
    pipeline.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def encode(pipeline: Any, prompt: str = "a red apple", negative: str = "", clip_skip: int = 1) -> torch.Tensor:
    return encode_prompts(pipeline, parse_prompt(prompt), parse_prompt(negative), 1, clip_skip).steps[0].prompt


def draw(pipeline: Any, prompt: str, **more: Any) -> Any:
    request = GenerationRequest(prompt, **{"steps": 1, "seed": 1, "upscale": 1, **more})
    return [picture.image for picture in generate(pipeline, request)]


# Texts


def test_a_prompt_that_was_encoded_is_not_encoded_again(pipeline: Any, encoder_runs: list[int]) -> None:
    first = draw(pipeline, "a red apple")
    assert len(encoder_runs) == 2  # the prompt, and the empty negative one
    assert draw(pipeline, "a red apple", count=2)[0] == first[0]
    assert len(encoder_runs) == 2
    draw(pipeline, "a cat")
    assert len(encoder_runs) == 3
    draw(pipeline, "a cat", init_image=first[0], steps=2)  # another pipeline with the same components
    assert len(encoder_runs) == 3


@pytest.mark.parametrize("changed", [{"prompt": "a (red:1.2) apple"}, {"clip_skip": 2}, {"prompt": "a red cat"}])
def test_what_decides_an_encoding_is_not_confused(
    changed: dict[str, Any], pipeline: Any, tiny_pipeline_folder: Path
) -> None:
    encode(pipeline)
    fresh = load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32")
    assert torch.equal(encode(pipeline, **changed), encode(fresh, **changed))
    assert not torch.equal(encode(pipeline, **changed), encode(pipeline))


def in_place(pipeline: Any) -> None:
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).mul_(1.5)


def textual_inversion(pipeline: Any) -> None:
    pipeline.load_textual_inversion({"apple": torch.ones(2, 32)}, token="apple")


def other_precision(pipeline: Any) -> None:
    pipeline.text_encoder.to(torch.bfloat16)


def lora(pipeline: Any) -> None:
    layer = "text_encoder.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    made = {f"{layer}.down.weight": torch.ones(2, 32), f"{layer}.up.weight": torch.ones(32, 2)}
    pipeline.load_lora_weights(made, adapter_name="made")


@pytest.mark.parametrize("change", [in_place, textual_inversion, other_precision, lora])
def test_a_text_encoder_that_was_changed_encodes_again(change: Any, pipeline: Any, encoder_runs: list[int]) -> None:
    before = encode(pipeline)
    change(pipeline)
    encoder_runs.clear()
    after = encode(pipeline)
    assert encoder_runs and not torch.equal(before.float(), after.float())


def test_a_lora_with_another_weight_encodes_again(pipeline: Any) -> None:
    lora(pipeline)
    made = []
    for weight in (1.0, 0.5, 0.0):
        pipeline.set_adapters(["made"], [weight])
        made.append(encode(pipeline))
    pipeline.delete_adapters("made")
    made.append(encode(pipeline))
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    assert torch.allclose(made[2], made[3], atol=1e-6)


def test_the_memory_of_encodings_is_bounded(
    pipeline: Any, encoder_runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_REMEMBERED", 3)
    for prompt in ("a", "red", "apple", "cat"):
        encode(pipeline, prompt)  # and the empty negative one, which stays because it is used each time
    assert len(encoder_runs) == 5
    encode(pipeline, "cat")
    assert len(encoder_runs) == 5
    encode(pipeline, "a")
    assert len(encoder_runs) == 6


# The network


@pytest.mark.parametrize(("guidance_scale", "pictures_each_step"), [(7.0, 2), (1.0, 1)])
def test_without_guidance_the_negative_prompt_costs_nothing(
    guidance_scale: float, pictures_each_step: int, pipeline: Any
) -> None:
    seen: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    draw(pipeline, "a cat", steps=2, guidance_scale=guidance_scale)
    assert seen == [pictures_each_step] * 2


def test_every_convolutional_component_has_its_weights_channels_last_and_in_the_precision_asked_for(
    tiny_pipeline_folder: Path,
) -> None:
    pipeline = load_pipeline(tiny_pipeline_folder, device="cpu", dtype="bf16")
    for name in ("unet", "vae", "upscaler", "text_encoder"):
        weights = dict(pipeline.components[name].named_parameters())
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}, name
        for key, weight in weights.items():
            assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last), (name, key)


def test_attention_is_torchs_own_unless_sliced_is_asked_for(tiny_pipeline_folder: Path) -> None:
    pictures, kinds = [], []
    for attention in ("sdpa", "sliced"):
        pipeline = load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32", attention=attention)
        kinds.append({type(processor) for processor in pipeline.unet.attn_processors.values()})
        pictures.append(draw(pipeline, "a cat")[0])
    assert kinds == [{AttnProcessor2_0}, {SlicedAttnProcessor}]
    assert max(abs(a - b) for a, b in zip(*(picture.tobytes() for picture in pictures), strict=True)) <= 1


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiling_is_left_to_the_first_step_and_to_the_unet(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32", compile=True)
    compiled = [name for name in ("unet", "vae", "text_encoder") if pipeline.components[name]._compiled_call_impl]
    assert compiled == ["unet"]
    plain = draw(load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32"), "a cat")
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute even for a network as small as this
        assert draw(pipeline, "a cat") == plain


def test_compiling_without_a_compiler_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="needs a C.. compiler"):
        load_pipeline(tmp_path / "no model", device="cpu", compile=True)


# The start


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (["models", "list"], "torch numpy PIL diffusers"),
        (
            ["upscale", "small.png", "--dtype", "fp32"],
            "diffusers transformers accelerate peft scipy sympy gradio",
        ),
    ],
)
def test_a_command_loads_nothing_that_it_does_not_need(words: list[str], unused: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "small.png")
    code = (
        f"import sys; from diptych.cli import main; status = main({words})\n"
        f"print(status, *set({unused.split()}) & set(sys.modules))"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "DIPTYCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0"), done.stderr
