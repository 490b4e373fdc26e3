"""`diptych upscale`: what a person at a shell can rely on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.cli import main
from diptych.upscalers import Upscaler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def network(make_srvgg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    Upscaler(make_srvgg(gain=0), device="cpu", dtype="fp32").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)


def upscale(network, *args):
    return main(["upscale", "--upscaler", network, "--device", "cpu", *map(str, args)])


def records(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_one_picture_goes_to_outputs_with_its_scale_in_its_name(network, here, capsys):
    picture(here / "a.png")
    assert upscale(network, "a.png") == 0
    assert capsys.readouterr().out == f"{Path('outputs/a-x4.png')}\n"
    with Image.open(here / "outputs" / "a-x4.png") as image:
        assert image.size == (32, 24)


def test_a_folder_keeps_its_structure_and_is_not_read_where_it_is_written(network, here):
    for name in ("one.png", "deep/er/two.jpg", ".hidden/no.png"):
        picture(here / "photos" / name)
    (here / "photos" / "notes.txt").write_text("not a picture, and nobody said it was")
    for _ in range(2):
        assert upscale(network, "photos", "-o", "photos/big", "--scale", 2, "--format", "png") == 0
    made = [str(path.relative_to(here / "photos" / "big")) for path in (here / "photos" / "big").rglob("*.*")]
    assert sorted(made) == [str(Path("deep/er/two-x2.png")), "one-x2.png"]


def test_a_pattern_is_expanded_where_the_shell_did_not(network, here, capsys):
    for name in ("a1.png", "a2.png", "b1.png"):
        picture(here / name)
    assert upscale(network, "a*.png", "--json") == 0
    assert [record["input"] for record in records(capsys)] == ["a1.png", "a2.png"]


def test_what_is_done_is_skipped_and_not_touched(network, here, capsys):
    picture(here / "a.png")
    (here / "outputs").mkdir()
    (here / "outputs" / "a-x4.png").write_bytes(b"made before")
    assert upscale(network, "a.png", "--json") == 0
    assert records(capsys)[0]["status"] == "skipped"
    assert (here / "outputs" / "a-x4.png").read_bytes() == b"made before"


def test_pictures_of_the_same_name_do_not_become_the_same_result(network, here, capsys):
    picture(here / "a.png")
    picture(here / "a.jpg")
    assert upscale(network, "a.png", "a.jpg", "--format", "png", "--json") == 0
    assert [record["status"] for record in records(capsys)] == ["done", "done"]
    assert len(list((here / "outputs").iterdir())) == 2


def test_a_file_that_is_named_as_the_output_is_written_in_its_format(network, here):
    picture(here / "a.png")
    assert upscale(network, "a.png", "-o", "b.webp", "--scale", 1.5) == 0
    with Image.open(here / "b.webp") as image:
        assert (image.format, image.size) == ("WEBP", (12, 9))


def test_what_fails_is_named_and_the_others_are_done(network, here, capsys):
    picture(here / "good.png")
    (here / "bad.png").write_text("text")
    (here / "empty").mkdir()
    assert upscale(network, "missing.png", "bad.png", "empty", "good.png") == 1
    said = capsys.readouterr()
    assert said.out == f"{Path('outputs/good-x4.png')}\n"
    lines = said.err.splitlines()
    assert lines[0] == "diptych: there is no picture missing.png"
    assert lines[1].startswith("diptych: bad.png: it is not a picture")
    assert lines[2] == "diptych: there is no picture in empty"


def test_json_says_everything_about_every_picture(network, here, capsys):
    picture(here / "a.png")
    (here / "bad.png").write_text("text")
    assert upscale(network, "a.png", "bad.png", "--json", "--dtype", "fp32") == 1
    done, failed = records(capsys)
    assert done.pop("seconds") >= 0
    assert done == {
        "input": "a.png",
        "output": str(Path("outputs/a-x4.png")),
        "status": "done",
        "width": 32,
        "height": 24,
        "scale": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    assert failed["status"] == "failed" and failed["reason"].startswith("bad.png: it is not a picture")


def test_a_terminal_is_told_how_far_how_fast_and_how_long_yet_and_no_file_is(network, here, capsys, monkeypatch):
    picture(here / "a.png", (300, 200))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert upscale(network, "a.png", "--dtype", "fp32") == 0
    told = capsys.readouterr().err
    assert re.search(r"a\.png \(float32\) +100 %  \d+\.\d\d Mpx/s  0:00 left", told)
    assert told.endswith("\r\x1b[K")  # nothing of it stays
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert upscale(network, "a.png", "--dtype", "fp32", "-o", "again.png") == 0
    assert capsys.readouterr().err == ""


def test_the_picture_itself_is_refused_as_output(network, here, capsys):
    picture(here / "a.png")
    before = (here / "a.png").read_bytes()
    assert upscale(network, "a.png", "-o", "a.png") == 1
    assert "a.png is the picture itself" in capsys.readouterr().err
    assert (here / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--scale", "99"], "scale must lie between 0.1 and 32, not 99"),
        (["--tile", "big"], "--tile is auto or a number of pixels, not 'big'"),
        (["--tile", "0"], "--tile is auto or a number of pixels, not '0'"),
        (["--dtype", "int3"], "there is no dtype called 'int3' here: use auto, fp32, fp16 or bf16"),
        (["--dtype", "fp16"], "fp16 is for GPUs: on a cpu use bf16, fp32 or auto"),
        (["--device", "tpu9"], "there is no device called 'tpu9': use auto, cpu"),
        (["--denoise", "0.5"], "denoise"),
        (["-o", "one.png"], "one.png is one file, and there are 2 pictures: name a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(network, here, capsys, args, sentence):
    picture(here / "a.png")
    picture(here / "b.png")
    paths = ["*.png"] if "-o" in args else ["a.png"]
    assert main(["upscale", *paths, "--upscaler", network, "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (here / "outputs").exists()


def test_a_network_that_does_not_exist_is_answered_with_near_names(here, capsys):
    picture(here / "a.png")
    assert main(["upscale", "a.png", "--upscaler", "x4pluss"]) == 1
    assert "x4plus" in capsys.readouterr().err


def loaded_by(program):
    """The top-level modules that are loaded when `program` ends."""
    program += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_neither_torch_nor_pictures():
    program = "from diptych.cli import main\ntry:\n    main(['upscale', '--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(program) & {"torch", "numpy", "PIL"}


def test_the_upscaler_loads_nothing_that_its_hosts_may_not_have():
    """Only torch, numpy, Pillow and safetensors, and what these bring along."""
    bare = loaded_by("import torch, numpy, PIL.Image, safetensors.torch")
    more = loaded_by("import diptych.upscalers.upscaler") - bare - {"diptych"} - set(sys.stdlib_module_names)
    assert not {name for name in more if not name.startswith("_")}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_leaves_nothing_half_written_and_status_130(network, here):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(here / "a.png")
    command = [
        sys.executable,
        "-m",
        "diptych",
        "upscale",
        "a.png",
        "--upscaler",
        network,
        "--scale",
        "16",
        "--dtype",
        "fp32",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=here,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    ) as process:
        while process.poll() is None and not list(here.glob("outputs/.*part*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert process.returncode == 130 and error.splitlines()[-1] == "diptych: interrupted"
    assert list((here / "outputs").iterdir()) == []
