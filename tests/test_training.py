"""The trainers resume to the bit, refuse what cannot work before any time is spent, and write what others read."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diptych.errors import CheckpointError, DiptychError, ImageError
from diptych.training import read_state, write_state

VAE = """
batch = 2
warmup = 2
validation_pictures = 4
[run]
folder = "{folder}"
steps = 6
log_every = 2
sample_every = 3
save_every = 2
mixed_precision = "{precision}"
[data]
folder = "{pictures}"
[model]
side = 32
channels = [8, 16]
norm_groups = 4
[loss]
discriminator_learns_from = 1
adversarial_from = 2
discriminator_width = 8
discriminator_layers = 2
"""
DIFFUSION = """
vae = "{vae}"
batch = 2
warmup = 2
cached_pictures = 8
[run]
folder = "{folder}"
steps = 6
log_every = 2
sample_every = 6
save_every = 2
mixed_precision = "{precision}"
[data]
folder = "{pictures}"
[model]
side = 32
channels = [8, 16]
attention = [false, true]
heads = 2
norm_groups = 4
text_width = 16
text_layers = 1
tokens = 16
vocabulary = 600
"""
MUON = 'optimizer = "muon"' + DIFFUSION


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(4):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}")
    return folder


@pytest.fixture(scope="module")
def trained_vae(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("vae", tmp_path_factory.mktemp("vae"), pictures)


def configuration(kind: str, folder: Path, pictures: Path, vae: Path | None = None, precision: str = "no") -> Path:
    text = {"vae": VAE, "diffusion": DIFFUSION, "muon": MUON}[kind]
    path = folder.with_suffix(".toml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(folder=folder, pictures=pictures, vae=vae, precision=precision))
    return path


def run(kind: str, folder: Path, pictures: Path, vae: Path | None = None, resume: bool = False, precision="no") -> Path:
    from diptych.pipelines.train import train as train_diffusion
    from diptych.vae.train import train as train_vae

    config = configuration(kind, folder / "run", pictures, vae, precision)
    return (train_vae if kind == "vae" else train_diffusion)(str(config), resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.update({f"{path.parent.name}/{key}": value for key, value in load_file(path).items()})
    return found


@pytest.mark.parametrize(("kind", "stopped_at"), [*product(["vae", "diffusion"], [2, 3, 5]), ("muon", 3)])
def test_a_run_interrupted_at_any_step_resumes_to_the_same_weights(
    kind: str, stopped_at: int, pictures: Path, trained_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(run(kind, tmp_path / "whole", pictures, trained_vae))
    from diptych.training import Run

    steps = Run.steps

    def until_interrupted(self: Run):
        for step in steps(self):
            if step == stopped_at:
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path / "parts", pictures, trained_vae)
    assert read_state(tmp_path / "parts/run/state.safetensors")[1] == stopped_at // 2 * 2
    resumed = weights(run(kind, tmp_path / "parts", pictures, trained_vae, resume=True))
    assert whole.keys() == resumed.keys()
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key
    rows = (tmp_path / "parts/run/metrics.csv").read_text()
    assert rows == (tmp_path / "whole/run/metrics.csv").read_text()


def test_muon_steps_are_orthogonal_matrices_whatever_the_memory_format() -> None:
    from diptych.pipelines.train import _muon

    torch.manual_seed(0)
    before, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    moves = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(before.clone(memory_format=memory_format))
        weight.grad = gradient.clone()
        _muon([weight], 0.1).step()
        moves.append(before * (1 - 0.1 * 0.01) - weight.detach())  # without the decay
    assert torch.allclose(moves[0], moves[1], atol=1e-3)
    sizes = torch.linalg.svdvals(moves[0].flatten(1))
    assert sizes.max() / sizes.min() < 2 and torch.linalg.svdvals(gradient.flatten(1)).diff().abs().max() > 0.1
    assert abs(moves[0].square().mean().sqrt() / (0.1 * 0.2) - 1) < 0.3, "as large as a step of AdamW"
    assert (moves[0] * gradient).sum() > 0, "downhill"


@pytest.mark.parametrize(
    ("precision", "version", "sentence"),
    [("fp16", True, "bf16 or without mixed precision, not in fp16"), ("no", False, "needs PyTorch 2.9")],
)
def test_muon_is_refused_where_it_cannot_run(
    precision: str, version: bool, sentence: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not version:
        monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=sentence):
        run("muon", tmp_path, pictures, tmp_path / "vae", precision=precision)


def test_the_text_encoder_learns_to_foresee_each_cell_of_the_latents(
    pictures: Path, trained_vae: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in pictures.glob("*.png"):  # as large as the model's, so that a caption has one picture
        Image.open(path).resize((32, 32)).save(tmp_path / path.name)
        (tmp_path / f"{path.stem}.txt").write_text((pictures / f"{path.stem}.txt").read_text())
    config = configuration("muon", tmp_path / "run", tmp_path, trained_vae)
    text = config.read_text().replace("cached_pictures = 8", "cached_pictures = 64\ntext_steps = 600")
    config.write_text(text.replace("tokens = 16", "tokens = 24\nsketch = 4").replace("\nsteps = 6", "\nsteps = 1"))
    from diptych.pipelines.train import train

    with caplog.at_level("INFO", logger="diptych.pipelines.train"):
        train(str(config))
    left = [record.args[1] for record in caplog.records if record.msg.startswith("words")]
    assert len(left) == 6 and left[-1] < 0.85 < left[0]


@pytest.mark.parametrize(("sketch", "sentence"), [(3, "does not divide the 16 latents"), (4, "square below tokens")])
def test_a_sketch_that_does_not_fit_is_refused(
    sketch: int, sentence: str, pictures: Path, trained_vae: Path, tmp_path: Path
) -> None:
    from diptych.pipelines.train import train

    config = configuration("diffusion", tmp_path / "run", pictures, trained_vae)
    config.write_text(config.read_text().replace("tokens = 16", f"tokens = 16\nsketch = {sketch}"))
    with pytest.raises(ValueError, match=sentence):
        train(str(config))


def test_workers_change_nothing_but_the_time(pictures: Path, trained_vae: Path, tmp_path: Path) -> None:
    from diptych.vae.train import train

    config = configuration("vae", tmp_path / "run", pictures)
    config.write_text(config.read_text().replace("[run]", "[run]\nworkers = 2"))
    ours, theirs = weights(train(str(config))), weights(trained_vae)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_killed_process_resumes_to_the_same_weights(pictures: Path, tmp_path: Path) -> None:
    whole = weights(run("vae", tmp_path / "whole", pictures))
    config = configuration("vae", tmp_path / "parts", pictures)
    command = [sys.executable, "-m", "diptych", "train", "vae", str(config)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "parts/state.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    from diptych.vae.train import train

    resumed = weights(train(str(config), resume=True))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_finished_vae_opens_in_diffusers_and_has_latents_of_unit_scale(trained_vae: Path, pictures: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(trained_vae)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mean
        assert vae.decode(latents).sample.shape == picture.shape
    assert latents.shape == (1, 4, 16, 16)
    assert vae.config.scaling_factor > 0


def test_a_finished_diffusion_model_opens_in_diffusers_and_draws(
    pictures: Path, trained_vae: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    folder = run("diffusion", tmp_path, pictures, trained_vae, precision="bf16")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("picture number 1", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3) and np.isfinite(picture).all()
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    assert len(vocabulary) == len(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    assert {"picture</w>", "number</w>"} <= vocabulary.keys(), "words of the captions become tokens"


def test_a_run_leaves_its_configuration_metrics_and_sheets(trained_vae: Path) -> None:
    folder = trained_vae.parent
    assert (folder / "config.toml").read_text().strip().startswith("batch")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert {"nll", "kl", "psnr", "ssim", "fd_random", "discriminator"} <= rows[-1].keys()
    assert float(rows[-1]["psnr"]) > 0
    for sheet in (folder / "samples").iterdir():
        with Image.open(sheet) as image:
            assert image.size == (2 * 134, 4 * 134)  # 4 pictures of 32 px, true and rebuilt, enlarged to 128, in cells


def test_a_frozen_encoder_keeps_its_latents(trained_vae: Path, pictures: Path, tmp_path: Path) -> None:
    from diptych.vae.train import train

    config = configuration("vae", tmp_path / "run", pictures)
    config.write_text(
        config.read_text().replace("[loss]", f'start_from = "{trained_vae}"\ntrain_encoder = false\n[loss]')
    )
    before, after = weights(trained_vae), weights(train(str(config)))
    changed = {key.split("/")[1].split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}


BAD_CONFIGURATIONS = [
    ("steps = 6", "steps = 0", "steps must be at least 1"),
    ("steps = 6", 'steps = "six"', "steps is 'six', but should be int"),
    ("batch = 2", "bacth = 2", "unknown key 'bacth'"),
    ('mixed_precision = "no"', 'mixed_precision = "fp8"', "mixed_precision is 'fp8'"),
    ("steps = 6", "steps = 6 6", "is not TOML"),
    ("steps = 6\n", "", "the key 'steps' is missing"),
    ("[data]\nfolder", "[data]\nsubjects = 'x.txt'\nfolder", "either `folder` or `subjects`"),
    ("[loss]", 'start_from = "nowhere"\n[loss]', "start_from = 'nowhere' is no folder"),
    ("[loss]", "train_encoder = false\n[loss]", "train_encoder = false needs start_from"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_refused_with_a_sentence(
    old: str, new: str, sentence: str, pictures: Path, tmp_path: Path
) -> None:
    from diptych.vae.train import train

    config = configuration("vae", tmp_path / "run", pictures)
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises((ValueError, DiptychError), match=r"^[^\n]*$") as caught:
        train(str(config))
    assert sentence in str(caught.value)


def test_an_empty_a_missing_and_an_unreadable_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"no picture")
    for name, sentence in [("empty", "holds no readable"), ("nowhere", "is not a folder"), ("damaged", "holds no")]:
        with pytest.raises(ImageError, match=sentence):
            run("vae", tmp_path, tmp_path / name)


def test_a_damaged_picture_is_named_skipped_and_counted(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diptych.data.folders import find_pictures

    good = (pictures / "0.png").read_bytes()
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "truncated.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    found = find_pictures(tmp_path)
    assert [picture.path.name for picture in found] == ["good.png"]
    assert "truncated.png" in caplog.text and "text.jpg" in caplog.text and "2 damaged pictures" in caplog.text


def test_resume_refuses_a_state_of_another_configuration(pictures: Path, tmp_path: Path) -> None:
    from diptych.vae.train import train

    run("vae", tmp_path, pictures)
    config = tmp_path / "run.toml"
    config.write_text(config.read_text().replace("channels = [8, 16]", "channels = [8, 32]"))
    with pytest.raises(CheckpointError, match="another configuration: model"):
        train(str(config), resume=True)


def test_a_finished_run_is_not_overwritten_and_a_missing_one_not_resumed(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state to resume"):
        run("vae", tmp_path, pictures, resume=True)
    run("vae", tmp_path, pictures)
    with pytest.raises(CheckpointError, match="already holds a run"):
        run("vae", tmp_path, pictures)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"GARBAGE" * 99])
def test_a_damaged_state_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state(tmp_path / "state.safetensors")


def test_a_state_survives_the_disk_whole(tmp_path: Path) -> None:
    tree = {"a": {0: torch.arange(3), 1: [1.5, None, "x", True]}, "b": torch.tensor(2.0, dtype=torch.bfloat16)}
    write_state(tmp_path / "s.safetensors", tree, 7, "{}")
    back, step = read_state(tmp_path / "s.safetensors")
    assert step == 7 and back["a"][1] == tree["a"][1]
    assert torch.equal(back["a"][0], tree["a"][0]) and torch.equal(back["b"], tree["b"])
