"""The main job, as a stranger meets it: an installed wheel, an empty folder, no network, one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

GUARD = """
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_MARK"], "a") as mark:
        mark.write(repr(args) + "\\n")
    raise OSError("there is no network")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture(scope="module")
def drawn(wheel_site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What `diptych generate` did in an empty folder, from the wheel, with every connection refused and noted."""
    folder = tmp_path_factory.mktemp("empty")
    guard = tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(GUARD)
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON", "DIPTYCH"))}
    env = keep | {"PYTHONPATH": f"{guard}{os.pathsep}{wheel_site}", "NETWORK_MARK": str(guard / "mark")}
    prompts = ["a red apple on a sky blue background", "a zeppelin on a gold background"]
    done = subprocess.run(
        [sys.executable, "-m", "diptych", "generate", *prompts, "--seed", "7", "--json"],
        cwd=folder,
        env=env | {"HOME": str(guard)},
        capture_output=True,
        text=True,
    )
    assert not (guard / "mark").exists(), (guard / "mark").read_text()
    return folder, done


def test_two_prompts_become_two_finished_pictures(drawn: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = drawn
    assert done.returncode == 0, done.stderr
    files = sorted((folder / "outputs").iterdir())
    assert len(files) == 2 and list(folder.iterdir()) == [folder / "outputs"]
    for file in files:
        with Image.open(file) as image:
            assert image.size == (256, 256) and image.mode == "RGB"
            assert image.getextrema() != ((0, 0),) * 3
            assert "Seed: 7" in image.info["parameters"]


def test_a_line_of_json_tells_of_each_picture(drawn: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = drawn
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["seed"] for line in lines] == [7, 7]
    assert {(folder / line["path"]).resolve() for line in lines} == {
        f.resolve() for f in (folder / "outputs").iterdir()
    }


def test_a_word_the_model_never_saw_is_named_and_stops_nothing(
    drawn: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = drawn
    assert "zeppelin" in done.stderr
    assert "apple" not in done.stderr.replace("a red apple on a sky blue background", "")
