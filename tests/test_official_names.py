"""Names of networks: the table, the cache folder, the nearest names, and the command that lists them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.cli import main
from diptych.errors import ModelNotFound
from diptych.upscalers import official
from diptych.upscalers.official import OFFICIAL, cache_folder, embedded_model, resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    cache_folder().mkdir()
    return cache_folder()


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_entry_of_the_table_is_complete(name):
    entry = OFFICIAL[name]
    assert re.fullmatch(r"https://github\.com/xinntao/Real-ESRGAN/releases/download/v[\d.]+/(.+)", entry.url)[1] == (
        entry.filename
    )
    assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.size > 2_000_000 and entry.scale in (2, 4)
    assert entry.wdn is None or entry.wdn in OFFICIAL


def test_the_table_has_the_official_real_esrgan_networks_and_no_hash_twice():
    assert set(OFFICIAL) == {
        "x4plus", "x4plus-anime-6B", "x2plus", "general-x4v3", "general-wdn-x4v3", "animevideov3",
    }  # fmt: skip
    assert len({entry.sha256 for entry in OFFICIAL.values()}) == len(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_networks_go_by_their_files_names_too(folder, name):
    path = folder / OFFICIAL[name].filename
    path.write_bytes(b"")
    for spelling in (name, name.upper(), path.name, path.stem, path.stem.lower()):
        assert resolve(spelling) == path


def test_a_path_is_itself(tmp_path):
    (tmp_path / "x4plus").write_bytes(b"")
    assert resolve(tmp_path / "x4plus") == tmp_path / "x4plus"
    assert resolve(str(tmp_path)) == tmp_path


def test_files_in_the_cache_folder_go_by_their_names(folder):
    (folder / "4x-UltraSharp.pth").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    assert resolve("4x-UltraSharp") == resolve("4x-UltraSharp.pth") == folder / "4x-UltraSharp.pth"
    assert list(official.cached_files()) == ["4x-UltraSharp"]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("x4pluss", "x4plus"),
        ("x4plus-anime", "x4plus-anime-6B"),
        ("General-x4v2", "general-x4v3"),
        ("animevideo", "animevideov3"),
        ("4x-ultrasharb", "4x-UltraSharp"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(folder, wrong, near):
    (folder / "4x-UltraSharp.pth").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=rf"no network '{wrong}'; did you mean .*{near}"):
        resolve(wrong)


def test_a_name_like_no_other_is_answered_with_all(folder):
    with pytest.raises(ModelNotFound, match="the names are x4plus, .*animevideov3"):
        resolve("zzz")


@pytest.mark.parametrize("missing", ["nothing.pth", "folder/nothing.safetensors"])
def test_a_missing_file_is_called_a_missing_file(folder, missing):
    with pytest.raises(ModelNotFound, match=f"there is no file {missing}"):
        resolve(missing)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DIPTYCH_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "diptych" / "upscalers"


def test_the_embedded_model_is_a_diffusers_folder_in_this_copy():
    root = Path(__file__).parent.parent
    if not (root / "models" / "diptych-glyphs" / "model_index.json").is_file():
        with pytest.raises(ModelNotFound, match="missing from this copy"):
            embedded_model()
    else:
        assert embedded_model() == root / "models" / "diptych-glyphs"


def test_models_lists_every_name_and_where_its_file_is(folder, capsys):
    (folder / "RealESRGAN_x4plus.pth").write_bytes(b"")
    (folder / "mine.safetensors").write_bytes(b"")
    assert main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"x4plus +x4 .*RealESRGAN_x4plus\.pth$", line) for line in lines)
    assert any(re.match(r"x2plus +x2 .*not downloaded \(67 MB\)$", line) for line in lines)
    assert any(re.match(r"mine .*mine\.safetensors$", line) for line in lines)


@pytest.mark.parametrize("arguments", [["--json"], ["list", "--json"], ["--json", "list"]])
def test_models_as_json_has_one_record_per_line(folder, capsys, arguments):
    (folder / "RealESRGAN_x4plus.pth").write_bytes(b"")
    assert main(["models", *arguments]) == 0
    records = {record["name"]: record for record in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(records) >= set(OFFICIAL)
    assert records["x4plus"]["path"] == str(folder / "RealESRGAN_x4plus.pth")
    assert records["x2plus"]["path"] is None and records["x2plus"]["sha256"] == OFFICIAL["x2plus"].sha256


def test_models_download_prints_the_path_and_goes_on_after_a_wrong_name(folder, capsys):
    (folder / "RealESRGAN_x4plus.pth").write_bytes(b"")
    assert main(["models", "download", "x4pluss", "x4plus"]) == 1
    out, err = capsys.readouterr()
    assert out.strip() == str(folder / "RealESRGAN_x4plus.pth")
    assert err.count("\n") == 1 and "did you mean x4plus" in err


def test_listing_loads_neither_torch_nor_anything_else_from_outside():
    root = Path(__file__).parent.parent
    program = (
        "import sys; from diptych.cli import main; main(['models', 'list'])\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'safetensors', 'diffusers'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.stderr.strip() == "[]"
