"""`diptych generate`, run in this process unless a terminal or a fresh interpreter is the point."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diptych.cli import main
from diptych.infotext import parse_infotext


@pytest.fixture
def generate(tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs the command in an empty folder; gives (status, lines of stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path / "home"))

    def run(*words: str, model: Path | str = tiny_pipeline_folder) -> tuple[int, list[str], str]:
        capsys.readouterr()
        quick = [] if "--from-png" in words else ["--steps", "2"]
        usual = ["--model", str(model), "--device", "cpu", "--dtype", "fp32", *quick]
        try:
            status = main(["generate", *usual, *words])  # of a flag given twice, the last one counts
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def with_parameters(path: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


def test_prompts_become_pngs_with_their_parameters_inside(generate: Any) -> None:
    status, paths, _ = generate("a red apple", "a cat", "-n", "2", "--seed", "7")
    assert status == 0
    assert paths == [f"outputs/{name}.png" for name in ("a-red-apple-7", "a-red-apple-8", "a-cat-7", "a-cat-8")]
    with Image.open(paths[1]) as image:
        info = parse_infotext(image.info["parameters"])
        assert image.size == (256, 256)
    assert info.prompt == "a red apple" and info.settings["Seed"] == "8" and info.settings["Size"] == "64x64"


def test_nothing_in_the_output_folder_is_ever_replaced(generate: Any) -> None:
    paths = [generate("a cat", "--seed", "7", "-o", "pictures")[1][0] for _ in range(3)]
    assert paths == ["pictures/a-cat-7.png", "pictures/a-cat-7-2.png", "pictures/a-cat-7-3.png"]
    assert sorted(os.listdir("pictures")) == sorted(Path(path).name for path in paths)


def test_json_gives_one_object_for_each_picture_and_nothing_else(generate: Any) -> None:
    status, lines, error = generate("a red zebra", "-n", "2", "--seed", "7", "--size", "96x64", "--json")
    first, second = (json.loads(line) for line in lines)
    assert (first["seed"], second["seed"], first["width"], first["height"]) == (7, 8, 96, 64)
    assert Path(first["path"]).is_file() and parse_infotext(first["infotext"]).prompt == "a red zebra"
    assert first["notes"] == ["this model was never shown the word 'zebra'"]
    assert error.count("zebra") == 1 and status == 0


def test_a_named_file_is_written(generate: Any, tmp_path: Path) -> None:
    assert generate("a cat", "-o", "new/picture.png", "--no-upscale")[:2] == (0, ["new/picture.png"])
    assert Image.open(tmp_path / "new/picture.png").size == (64, 64)


def test_a_picture_is_drawn_again_from_its_png(generate: Any) -> None:
    first = generate(
        "a (red:1.3) apple", "--negative", "cat", "--seed", "3", "--scheduler", "Euler a", "--upscale", "2"
    )
    again = generate("--from-png", first[1][0])
    assert np.array_equal(pixels(first[1][0]), pixels(again[1][0]))


def test_flags_win_over_the_parameters_of_the_png(generate: Any) -> None:
    first = generate("a cat", "--seed", "3")
    again = generate("a red apple", "--from-png", first[1][0], "--seed", "4", "--no-upscale", "--json")
    line = json.loads(again[1][0])
    assert (line["prompt"], line["seed"], line["width"]) == ("a red apple", 4, 64)
    assert "Steps: 2," in line["infotext"]


def test_a_png_of_automatic1111_is_drawn_and_what_differs_is_said(generate: Any, tmp_path: Path) -> None:
    png = with_parameters(
        tmp_path / "a1111.png",
        "a (cat:1.2), [red:green:0.5]\nNegative prompt: blurry\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 5.5,"
        " Seed: 12, Size: 64x96, Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, Hires upscale: 2, Hires steps: 10,"
        " Hires upscaler: Latent, Denoising strength: 0.5, Eta: 0.3, Version: v1.10.1",
    )
    status, lines, error = generate("--from-png", str(png), "--json", "--steps", "6")
    info = parse_infotext(json.loads(lines[0])["infotext"])
    assert status == 0 and info.negative_prompt == "blurry"
    expected = {"Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "5.5", "Seed": "12", "Clip skip": "2"}
    assert expected.items() <= info.settings.items() and json.loads(lines[0])["width"] == 128
    assert info.settings["Hires steps"] == "10" and info.settings["Hires upscaler"] == "Latent"
    assert "drawn on a GPU" in error and "not used from its settings: Eta" in error


def test_a_picture_and_a_mask_are_taken_from_files(generate: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "init.png")
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    status, paths, _ = generate("a cat", "--init", "init.png", "--mask", "mask.png", "--strength", "1")
    assert status == 0 and (pixels(paths[0]) == (255, 0, 0)).all()


def test_a_lora_a_vae_and_the_layers_of_the_text_encoder_are_taken_from_flags(
    generate: Any, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    vae = {key: weight * 1.5 for key, weight in load_file(next(tiny_pipeline_folder.glob("vae/*.safetensors"))).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.lora_"
    lora = {f"{key}A.weight": torch.ones(2, 32), f"{key}B.weight": torch.ones(16, 2)}
    save_file(lora, tmp_path / "bold.safetensors")
    drawn = []
    for flags in ([], ["--vae", "vae.safetensors"], ["--lora", "bold.safetensors:0.5"], ["--clip-skip", "2"]):
        status, lines, _ = generate("a cat", "--seed", "3", "--no-upscale", "--json", *flags)
        assert status == 0
        drawn.append(pixels(json.loads(lines[0])["path"]))
        info = parse_infotext(json.loads(lines[0])["infotext"]).settings
        assert info.get("Loras") == ("bold: 0.5" if "--lora" in flags else None)
        assert info.get("Clip skip") == ("2" if "--clip-skip" in flags else None)
    assert not any(np.array_equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "there is no prompt"),
        ([""], 2, "prompt is empty"),
        (["a", "--steps", "-1"], 2, "steps is -1"),
        (["a", "--steps", "many"], 2, "invalid int value"),
        (["a", "--size", "64"], 2, "is no size"),
        (["a", "--size", "4x4"], 2, "width is 4"),
        (["a", "--seed", "-3"], 2, "seed is -3"),
        (["a", "--scheduler", "Euler b"], 2, "no scheduler called 'Euler b': try Euler"),
        (["a", "--attention", "magic"], 2, "no attention called"),
        (["a", "--attention", "xformers"], 2, "xformers has no operator for cpu: leave --attention out"),
        (["a", "--upscale", "2", "--no-upscale"], 2, "not allowed with"),
        (["a", "--unknown"], 2, "unrecognized arguments"),
        (["a", "--device", "cuda:99"], 2, "cuda:99"),
        (["a", "--dtype", "fp16"], 2, "fp16 is for GPUs"),
        (["a", "--dtype", "int3"], 2, "int3"),
        (["a", "-o", "picture.jpg"], 2, "written as .png"),
        (["a", "-o", "picture.png", "-n", "2"], 2, "name a folder"),
        (["a", "--mask", "broken.png"], 1, "broken.png is no picture"),
        (["a", "--init", "missing.png"], 1, "there is no picture missing.png"),
        (["a", "--init", "picture.png", "--strength", "2"], 2, "strength is 2"),
        (["a", "--upscale", "2", "--refine", "1.5"], 2, "refine is 1.5"),
        (["a", "--size", "64x64", "--refine", "0.3"], 2, "nothing is enlarged here"),
        (["a", "--init", "picture.png", "--mask", "small.png"], 2, "make them the same size"),
        (["a", "--lora", "missing.safetensors:0.5"], 1, "no LoRA file missing.safetensors"),
        (["a <lora:missing:1>"], 1, "no LoRA called 'missing'"),
        (["a", "--vae", "missing.safetensors"], 1, "missing.safetensors"),
        (["a", "--upscaler", "missing"], 1, "missing"),
        (["a", "--clip-skip", "9"], 2, "clip skip is 9"),
        (["--from-png", "missing.png"], 1, "there is no picture missing.png"),
        (["--from-png", "broken.png"], 1, "broken.png is no picture"),
        (["--from-png", "picture.png"], 1, "has no `parameters` text"),
        (["--from-png", "nonsense.png"], 1, "nonsense.png: this is no `parameters` text"),
        (["--from-png", "odd.png"], 1, "'Steps' of the `parameters` text is nonsense"),
        (["a", "-o", "picture.png/inside"], 1, "cannot be made"),
    ],
)
def test_bad_input_is_one_sentence_with_the_right_status_and_no_file(
    generate: Any, tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    Image.new("L", (32, 32)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with_parameters(tmp_path / "nonsense.png", "hello there")
    with_parameters(tmp_path / "odd.png", "a cat\nSteps: many, Sampler: Euler, Seed: 1")
    found, printed, error = generate(*words)
    assert (found, printed) == (status, [])
    assert said in error and "Traceback" not in error
    sentences = [line for line in error.splitlines() if line.startswith("diptych")]
    assert len(sentences) == 1
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize("damage", ["truncated", "no model", "missing"])
def test_a_model_that_is_none_is_said(damage: str, generate: Any, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    if damage == "truncated":
        model.write_bytes((tiny_pipeline_folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()[:5000])
    elif damage == "no model":
        model.write_bytes(b"hello")
    status, lines, error = generate("a cat", model=model)
    assert (status, lines, len(error.splitlines())) == (1, [], 1) and "model.safetensors" in error


def test_an_enlarged_picture_is_refined(generate: Any) -> None:
    first = generate("a cat", "--seed", "1", "--upscale", "2", "--refine", "0.5", "--refine-steps", "1")
    again = generate("--from-png", first[1][0])
    with Image.open(first[1][0]) as image:
        assert image.size == (128, 128)
        assert parse_infotext(image.info["parameters"]).settings["Hires steps"] == "1"
    assert np.array_equal(pixels(first[1][0]), pixels(again[1][0]))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of resources")
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_no_half_picture(generate: Any, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status, lines, error = generate("a cat", "-o", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, lines) == (1, []) and "full/a-cat" in error and "cannot be written: File too large" in error
    assert os.listdir(tmp_path / "full") == []


def test_a_picture_that_may_not_fit_the_disk_is_said_before_it_is_drawn(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    status, lines, error = generate("a cat", "--steps", "1000")
    assert (status, lines) == (1, []) and "may take 0.2 MB, and its disk has 0.0 MB free" in error


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_drawn(generate: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    assert generate("a cat", "-o", "locked")[0] == 1


def test_one_prompt_that_fails_does_not_stop_the_others(generate: Any) -> None:
    status, paths, error = generate("a <lora:missing:1>", "a cat", "--seed", "1")
    assert (status, paths) == (1, ["outputs/a-cat-1.png"])
    assert "failed: there is no LoRA called 'missing'" in error


UNUSED = {
    "gradio",
    "fastapi",
    "pandas",
    "sklearn",
    "skimage",
    "torchvision",
    "scipy.stats._stats_py",  # a stand-in has the module's name, and none of its parts
    "scipy.optimize._optimize",
    "scipy.integrate._quadrature",
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "diptych.training",
    "diptych.pipelines.train",
}


def test_a_fresh_process_draws_without_network_and_prints_nothing_but_the_path(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('the network was asked')\n"
        "socket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
        # What a picture does not need is not loaded, whoever asks for it while libraries are imported.
        "import atexit, os, sys\n"
        f"unused = {UNUSED}\n"
        "end = lambda: print('loaded:', *unused.intersection(sys.modules), file=open('loaded.txt', 'w'))\n"
        "'diptych' in sys.orig_argv and atexit.register(end)\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    environment.pop("HF_HUB_OFFLINE", None)
    words = ["a cat", "--model", str(tiny_pipeline_folder), "--steps", "2", "--seed", "1"]
    command = [sys.executable, "-m", "diptych", "generate", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "outputs/a-cat-1.png\n", "")
    assert (tmp_path / "loaded.txt").read_text().split() == ["loaded:"]
