"""`diptych train upscaler`: what it reads, what it writes, and that a killed run goes on as if nothing had happened."""

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diptych.data import glyphs, photos
from diptych.errors import CheckpointError, ImageError, ModelNotFound
from diptych.upscalers.pairs import DataConfig, Pairs
from diptych.upscalers.train import train
from diptych.upscalers.upscaler import Upscaler

SRVGG = 'architecture = "SRVGGNetCompact"\nnum_feat = 8\nnum_conv = 2\ndiscriminator_feat = 4'
RRDB = 'architecture = "RRDBNet"\nnum_feat = 8\nnum_block = 1\nnum_grow_ch = 4\ndiscriminator_feat = 4\nscale = 2'


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five drawings of discs and stripes, PNG, 64 to 80 pixels a side."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(5):
        y, x = np.mgrid[0 : 64 + 4 * index, 0:72]
        disc = ((x - rng.integers(72)) ** 2 + (y - rng.integers(64)) ** 2 < 400)[..., None]
        stripes = ((x + y * index) // 9 % 2)[..., None]
        colours = rng.integers(256, size=(3, 3))
        picture = np.where(disc, colours[0], np.where(stripes, colours[1], colours[2]))
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def configuration(
    folder: Path, pictures: Path, steps: int, *, model: str = SRVGG, top: str = "", loss: str = "gan_from = 3"
) -> str:
    """Writes a tiny configuration for a run in `folder`, and returns its path."""
    path = folder.parent / f"{folder.name}-{steps}.toml"
    path.write_text(
        f"batch = 2\npatch = 32\nwarmup = 2\nvalidation_pictures = 2\nfitted = 8\n{top}\n"
        f"[run]\nfolder = '{folder}'\nsteps = {steps}\nsave_every = 2\nlog_every = 1\nsample_every = 4\n"
        f"[data]\nfolder = '{pictures}'\n[model]\n{model}\n[loss]\n{loss}\n"
    )
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "upscaler" / "diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", [SRVGG, RRDB])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, pictures: Path, model: str, stop: int
) -> None:
    """Stopped within stage 1, at the border of the stages, and within stage 2."""
    train(configuration(tmp_path / "whole", pictures, 6, model=model))
    train(configuration(tmp_path / "parts", pictures, stop, model=model))
    train(configuration(tmp_path / "parts", pictures, 6, model=model), resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for row, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert (row["step"], row["l1"], row["fake"]) == (other["step"], other["l1"], other["fake"])


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, pictures: Path) -> None:
    config = configuration(tmp_path / "killed", pictures, 400)
    program = [sys.executable, "-m", "diptych", "train", "upscaler", config]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(program, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(rows(tmp_path / "killed")) >= 5):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = int(rows(tmp_path / "killed")[-1]["step"])
    assert 5 <= reached < 400
    end = reached + 4
    train(configuration(tmp_path / "killed", pictures, end), resume=True)
    train(configuration(tmp_path / "whole", pictures, end))
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    steps = [int(row["step"]) for row in rows(tmp_path / "killed")]
    assert steps == list(range(1, end + 1))


def test_training_restores_unseen_degraded_pictures_better_than_lanczos(tmp_path: Path) -> None:
    folder = tmp_path / "gradients"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        corners = Image.fromarray(rng.integers(256, size=(3, 3, 3), dtype=np.uint8))
        corners.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    model = SRVGG.replace("num_feat = 8", "num_feat = 24")
    config = configuration(tmp_path / "run", folder, 60, model=model, loss="gan_from = 999")
    text = Path(config).read_text().replace("_pictures = 2", "_pictures = 16").replace("fitted = 8", "fitted = 64")
    Path(config).write_text(text.replace("batch = 2", "batch = 4").replace("_every = 4", "_every = 60"))
    train(config)
    last = rows(tmp_path / "run")[-1]
    assert float(last["psnr_folder"]) > float(last["psnr_folder_lanczos"]) + 0.3


@pytest.mark.parametrize(("model", "scale"), [(SRVGG, 4), (RRDB, 2)])
def test_the_finished_network_is_an_upscaler_folder(tmp_path: Path, pictures: Path, model: str, scale: int) -> None:
    folder = train(configuration(tmp_path / "run", pictures, 1, model=model))
    upscaler = Upscaler.from_pretrained(folder, device="cpu", dtype="fp32")
    assert upscaler.scale == scale
    assert upscaler.upscale(Image.new("RGB", (12, 10))).size == (12 * scale, 10 * scale)


def test_a_run_keeps_its_configuration_its_figures_and_sheets(tmp_path: Path, pictures: Path) -> None:
    config = configuration(tmp_path / "run", pictures, 6)
    train(config)
    assert (tmp_path / "run" / "config.toml").read_text() == Path(config).read_text()
    found = rows(tmp_path / "run")
    assert [int(row["step"]) for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["l1"]) > 0 for row in found)
    assert [row["discriminator"] != "" for row in found] == [False] * 3 + [True] * 3  # stage 2 from step 3 on
    assert found[3]["psnr_folder"] and found[3]["psnr_folder_lanczos"] and not found[2]["psnr_folder"]
    sheets = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert sheets == ["0000004.png", "0000006.png"]
    with Image.open(tmp_path / "run" / "samples" / "0000006.png") as sheet:
        assert sheet.width == 4 * (128 + 6)  # small, Lanczos, ours, true, each enlarged to be seen


def test_a_run_can_start_from_the_weights_of_another(tmp_path: Path, pictures: Path) -> None:
    first = train(configuration(tmp_path / "first", pictures, 1))
    second = configuration(tmp_path / "second", pictures, 1, top=f"start_from = '{first}'\nlearning_rate = 1e-30")
    train(second)
    made, begun = weights(tmp_path / "second"), weights(tmp_path / "first")
    assert all(torch.allclose(made[key], begun[key], atol=1e-12) for key in begun)


def test_weights_of_another_network_are_refused_as_a_start(tmp_path: Path, pictures: Path) -> None:
    first = train(configuration(tmp_path / "first", pictures, 1))
    config = configuration(tmp_path / "second", pictures, 1, model=RRDB, top=f"start_from = '{first}'")
    with pytest.raises(ValueError, match="holds a SRVGGNetCompact of .*, not the network of"):
        train(config)


def test_a_damaged_picture_and_one_that_is_too_small_are_named_skipped_and_counted(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    Image.new("RGB", (31, 90)).save(folder / "narrow.png")
    with caplog.at_level(logging.WARNING):
        train(configuration(tmp_path / "run", folder, 1))
    assert "broken.png is skipped" in caplog.text and "1 damaged pictures" in caplog.text
    assert "narrow.png is skipped: 31x90 is smaller than a patch of 32" in caplog.text
    assert "1 pictures that are too small were skipped, 5 are used" in caplog.text


def test_a_folder_with_nothing_to_train_on_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    small = tmp_path / "small"
    (tmp_path / "empty").mkdir()
    small.mkdir()
    Image.new("RGB", (16, 16)).save(small / "a.png")
    for folder, sentence in (
        (tmp_path / "absent", "is not a folder"),
        (tmp_path / "empty", "holds no readable picture"),
        (small, "None of the 1 pictures has 32 x 32 pixels"),
    ):
        with pytest.raises(ImageError, match=sentence):
            train(configuration(tmp_path / "run", folder, 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("patch = 32", "patch = 36", "patch must be a multiple of 8 and at least 32, not 36"),
        ("batch = 2", "batch = 0", "batch must be at least 1, not 0"),
        ("batch = 2", "bacth = 2", "unknown key 'bacth'"),
        ("[data]", "[data]\nphotos = '/'\nsubjects = 's'", "either `folder`, or `photos` and `subjects`"),
        ("[data]", "[data]\nvae = 'v'", "`vae` and `decodes` belong together"),
        ("[data]", "[data]\nglyphs = 1.5", "must be positive and not exceed 1"),
        ("num_conv = 2", "num_conv = 'two'", "num_conv is 'two', but should be int"),
        ("SRVGGNetCompact", "SwinIR", "architecture is 'SwinIR'"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_sentence(
    tmp_path: Path, pictures: Path, old: str, new: str, sentence: str
) -> None:
    config = configuration(tmp_path / "run", pictures, 1)
    Path(config).write_text(Path(config).read_text().replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        train(config)


def test_a_state_of_another_configuration_is_refused(tmp_path: Path, pictures: Path) -> None:
    train(configuration(tmp_path / "run", pictures, 1))
    config = configuration(tmp_path / "run", pictures, 2, model=SRVGG.replace("num_conv = 2", "num_conv = 3"))
    with pytest.raises(CheckpointError, match="belongs to another configuration: model"):
        train(config, resume=True)


# The built-in data --------------------------------------------------------------------------------------------------


def test_every_photograph_names_its_author_and_a_free_licence_and_no_two_share_a_name() -> None:
    free = {"public domain", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "LGPL-3.0"}
    assert {photo.licence for photo in photos.PHOTOS} <= free
    assert all(photo.author for photo in photos.PHOTOS)
    assert len({photo.name for photo in photos.PHOTOS}) == len(photos.PHOTOS)
    assert sum(photo.held_out for photo in photos.PHOTOS) == 6


def test_missing_photographs_are_asked_for_by_the_name_of_their_package(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("skimage")
    with caplog.at_level(logging.WARNING):
        found = photos.find_photos(tmp_path)
    assert {photo.package for photo in found} == {"scikit-image"}
    assert "lomiri-wallpapers-16.04" in caplog.text and "plasma-workspace-wallpapers" in caplog.text


def test_crops_keep_the_pixels_of_the_picture(pictures: Path) -> None:
    source = photos.CropSource((pictures / "2.png",))
    with Image.open(pictures / "2.png") as image:
        known = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}
    crops = source.batch(np.random.default_rng(0), 6, 32)
    assert crops.shape == (6, 32, 32, 3)
    assert {tuple(colour) for colour in crops.reshape(-1, 3).tolist()} <= known
    assert len({crop.tobytes() for crop in crops}) > 1


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """A list of three glyphs. Skips where the photographs of scikit-image or the glyph font are missing."""
    pytest.importorskip("skimage")
    try:
        glyphs.font_file()
    except ModelNotFound as error:
        pytest.skip(str(error))
    path = tmp_path / "subjects.txt"
    path.write_text("red apple\nviolin\ncat\n")
    return path


def built_in(folder: Path, subjects: Path, more: str = "") -> str:
    config = configuration(folder, folder, 1)
    text = Path(config).read_text()
    data = f"[data]\nphotos = '{folder.parent}'\nsubjects = '{subjects}'\n{more}"
    Path(config).write_text(text.replace(f"[data]\nfolder = '{folder}'", data))
    return config


def test_the_built_in_data_trains_and_is_measured_on_what_is_held_out(tmp_path: Path, subjects: Path) -> None:
    train(built_in(tmp_path / "run", subjects))
    (row,) = rows(tmp_path / "run")
    assert {"psnr_photos", "psnr_photos_lanczos", "psnr_glyphs", "psnr_glyphs_lanczos"} <= set(row)


def test_pairs_of_decodes_are_small_through_the_vae_and_large_as_drawn(tmp_path: Path, subjects: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    data = DataConfig(photos=str(tmp_path), subjects=str(subjects), glyphs=0, vae=str(tmp_path / "vae"), decodes=1)
    pairs = Pairs(data, 64, 4, sharpen=False)
    small, target, large = pairs.batch(np.random.default_rng(0), 3, torch.device("cpu"))
    assert small.shape == (3, 3, 16, 16) and large.shape == (3, 3, 64, 64) and torch.equal(target, large)


def test_a_vae_that_is_none_is_refused(tmp_path: Path, subjects: Path) -> None:
    with pytest.raises(ValueError, match="is no folder of an AutoencoderKL"):
        train(built_in(tmp_path / "run", subjects, f"vae = '{tmp_path}'\ndecodes = 0.5"))
