"""The Automatic1111 extension: installing, loading beside others, Reload UI, and `diptych install-extension`."""

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "extensions" / "sd-webui-diptych"
FLAVOURS = ["a1111", "forge", "classic"]


def install_command(webui: Path, *options: str) -> int:
    from diptych.cli import main

    return main(["install-extension", str(webui), *options])


def make_webui(tmp_path: Path) -> Path:
    webui = tmp_path / "webui"
    (webui / "modules").mkdir(parents=True)
    (webui / "modules" / "upscaler.py").touch()
    (webui / "modules" / "script_callbacks.py").touch()
    (webui / "extensions").mkdir()
    return webui


def give_embedded_network(installed: Path) -> Path:
    """Puts a small network where an installed copy has the embedded one; returns its folder."""
    from diptych.upscalers.networks import SRVGGNetCompact, load_network
    from diptych.upscalers.upscaler import Upscaler

    folder = installed / "diptych" / "models" / "diptych-glyphs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").touch()
    torch.manual_seed(0)
    network = load_network(SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4).state_dict())
    Upscaler(network, device="cpu").save_pretrained(folder / "upscaler")
    return folder / "upscaler"


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ["sd-webui-diptych", "renamed by the user"])
def test_the_repository_itself_is_an_extension(make_host: Any, flavour: str, name: str) -> None:
    host = make_host(flavour, extension=None)
    (host.webui / "extensions" / name).symlink_to(ROOT, target_is_directory=True)
    assert "Diptych RealESRGAN_x4plus" in host.start().names()
    assert any(script.title() == "Diptych" for script in host.module("scripts").scripts_txt2img.scripts)
    assert "Diptych finish" in [script.name for script in host.module("scripts").scripts_postproc.scripts]
    assert not host.reports


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_none_of_our_folders_is_left_on_the_path_or_found_by_a_common_name(make_host: Any, flavour: str) -> None:
    host = make_host(flavour, extension=None)
    (host.webui / "extensions" / "diptych").symlink_to(ROOT, target_is_directory=True)
    before = set(sys.modules)
    host.start()
    assert str(host.webui / "extensions" / "diptych") not in sys.path
    ours = {name.partition(".")[0] for name in set(sys.modules) - before if "sd-webui" in _file(name) or _is_ours(name)}
    assert ours <= {"diptych", "sd_webui_diptych", "modules", "gradio"}


def _file(name: str) -> str:
    return str(getattr(sys.modules[name], "__file__", None) or "")


def _is_ours(name: str) -> bool:
    return _file(name).startswith(str(ROOT))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_extension_with_a_package_called_upscalers_does_no_harm(make_host: Any, flavour: str) -> None:
    host = make_host(flavour)
    other = host.webui / "extensions" / "a-first"
    for package in ("upscalers", "diptych_errors", "webui"):
        (other / package).mkdir(parents=True)
        (other / package / "__init__.py").write_text("raise RuntimeError('not yours')")
    (other / "scripts").mkdir()
    (other / "scripts" / "first.py").touch()
    assert "Diptych RealESRGAN_x4plus" in host.start().names()
    assert not host.reports


def test_another_diptych_in_memory_is_told_and_the_host_starts(
    make_host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host()
    other = host.webui / "extensions" / "a-first"
    (other / "diptych").mkdir(parents=True)
    (other / "diptych" / "__init__.py").touch()
    (other / "scripts").mkdir()
    (other / "scripts" / "first.py").write_text("import diptych")
    assert "Lanczos" in host.start().names()
    assert "installed twice" in caplog.text


def test_a_second_copy_is_told_and_not_used(make_host: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = make_host()
    shutil.copytree(EXTENSION, host.webui / "extensions" / "sd-webui-diptych-2")
    shutil.copytree(ROOT / "upscalers", host.webui / "extensions" / "sd-webui-diptych-2" / "diptych" / "upscalers")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "diptych" / name, host.webui / "extensions" / "sd-webui-diptych-2" / "diptych" / name)
    names = host.start().names()
    assert names.count("Diptych RealESRGAN_x4plus") == 1
    assert "installed twice" in caplog.text
    titles = [script.title() for script in host.module("scripts").scripts_txt2img.scripts]
    assert titles.count("Diptych") == 1


def test_a_disabled_extension_is_gone(make_host: Any) -> None:
    host = make_host(options={"disabled_extensions": ["sd-webui-diptych"]})
    assert not [name for name in host.start().names() if "Diptych" in name]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_reload_ui_after_an_update_runs_the_new_code_and_lists_new_files(
    tmp_path: Path, make_host: Any, flavour: str
) -> None:
    webui = make_webui(tmp_path)
    assert install_command(webui) == 0
    host = make_host(flavour, extension=None).start()
    code = host.webui / "extensions" / "sd-webui-diptych" / "sd_webui_diptych" / "upscaler.py"
    code.write_text(code.read_text().replace("prefix + entry.name, path", 'prefix + entry.name + " new", path'))
    for _ in range(2):
        host.reload_ui()
        assert host.names().count("Diptych RealESRGAN_x4plus new") == 1
        assert "Diptych RealESRGAN_x4plus" not in host.names()
        titles = [script.title() for script in host.module("scripts").scripts_txt2img.scripts]
        assert titles.count("Diptych") == 1
    assert not host.reports


def test_install_py_takes_less_than_a_second_and_changes_nothing(tmp_path: Path) -> None:
    for script in (ROOT / "install.py", EXTENSION / "install.py"):
        environment = {"PATH": "", "PYTHONPATH": str(tmp_path)}
        before = time.monotonic()
        subprocess.run([sys.executable, "-S", str(script)], check=True, cwd=tmp_path, env=environment, timeout=10)
        assert time.monotonic() - before < 10
        assert "import" not in script.read_text().partition('"""\n')[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_install_extension_puts_a_working_copy_into_a_host(tmp_path: Path, make_host: Any, flavour: str) -> None:
    webui = make_webui(tmp_path)
    assert install_command(webui) == 0
    installed = webui / "extensions" / "sd-webui-diptych"
    give_embedded_network(installed)
    host = make_host(flavour, extension=None).start()
    assert "Diptych glyphs x4" in host.names()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert host.extra_single_image(image, "Diptych glyphs x4", 4).size == (64, 64)
    assert Path(sys.modules["diptych.upscalers"].__file__ or "").is_relative_to(installed)


def test_a_damaged_embedded_network_is_an_error_when_it_is_used(tmp_path: Path, make_host: Any) -> None:
    webui = make_webui(tmp_path)
    install_command(webui)
    folder = give_embedded_network(webui / "extensions" / "sd-webui-diptych")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    (folder / "config.json").write_text("{")
    host = make_host(extension=None).start()
    with pytest.raises(Exception, match="config.json"):
        host.extra_single_image(Image.new("RGB", (8, 8)), "Diptych glyphs x4", 4)


def test_install_extension_updates_in_place_and_keeps_the_users_files(tmp_path: Path) -> None:
    webui = make_webui(tmp_path)
    install_command(webui)
    installed = webui / "extensions" / "sd-webui-diptych"
    (installed / "my notes.txt").write_text("mine")
    (installed / "sd_webui_diptych" / "work.py").write_text("old")
    (installed / "left over.py").touch()
    names = (installed / "installed-files.json").read_text()
    (installed / "installed-files.json").write_text(names.replace("[", '["left over.py", "../outside.txt",', 1))
    (installed.parent / "outside.txt").touch()
    assert install_command(webui) == 0
    assert (installed / "my notes.txt").read_text() == "mine"
    assert (installed / "sd_webui_diptych" / "work.py").read_text() != "old"
    assert not (installed / "left over.py").exists()
    assert (installed.parent / "outside.txt").exists()
    assert not [path for path in installed.rglob("*") if path.name.endswith(".pyc") or ".part" in path.name]


def test_install_extension_can_link_instead_of_copying(tmp_path: Path, make_host: Any) -> None:
    webui = make_webui(tmp_path)
    assert install_command(webui, "--link") == 0
    assert install_command(webui, "--link") == 0
    assert os.path.samefile(webui / "extensions" / "sd-webui-diptych", EXTENSION)
    assert "Diptych RealESRGAN_x4plus" in make_host(extension=None).start().names()
    assert install_command(webui) == 0  # and back again
    assert not (webui / "extensions" / "sd-webui-diptych").is_symlink()
    assert (EXTENSION / "install.py").is_file()


def test_install_extension_refuses_what_is_not_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install_command(tmp_path) == 2
    assert "is no Automatic1111 or Forge" in capsys.readouterr().err
    assert install_command(tmp_path / "nothing") == 2
    assert "is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "message"),
    [("clone", "is a Git clone"), ("foreign", "was not put there by this command"), ("elsewhere", "installed already")],
)
def test_install_extension_leaves_alone_what_it_did_not_put_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    webui = make_webui(tmp_path)
    target = webui / "extensions" / "sd-webui-diptych"
    if what == "clone":
        (target / ".git").mkdir(parents=True)
    elif what == "foreign":
        target.mkdir()
    else:
        shutil.copytree(EXTENSION, webui / "extensions" / "Diptych" / "extensions" / "sd-webui-diptych")
    assert install_command(webui) == 1
    assert message in capsys.readouterr().err


def test_the_extension_alone_without_the_engine_says_what_is_missing(make_host: Any) -> None:
    host = make_host(extension=None)
    shutil.copytree(EXTENSION, host.webui / "extensions" / "sd-webui-diptych")
    assert "Lanczos" in host.start().names()
    assert "install the extension again" in host.reports[0]


def test_loading_the_extension_logs_nothing(make_host: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_host().start()
    assert not [record for record in caplog.records if "diptych" in record.name]
