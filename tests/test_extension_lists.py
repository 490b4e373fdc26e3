"""The Automatic1111 extension: which upscalers appear in a host's lists, and what happens when some cannot."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

FLAVOURS = ["a1111", "forge", "classic"]
OFFICIAL = [
    "RealESRGAN_x4plus", "RealESRGAN_x4plus_anime_6B", "RealESRGAN_x2plus", "realesr-general-x4v3",
    "realesr-general-wdn-x4v3", "realesr-animevideov3",
]  # fmt: skip


def save_network(path: Path, scale: int = 4, seed: int = 0) -> Path:
    from diptych.upscalers.networks import SRVGGNetCompact

    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=scale)
    (torch.save if path.suffix == ".pth" else save_file)(network.state_dict(), path)
    return path


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_network_file_of_the_hosts_folders_is_listed_with_its_true_scale(make_host: Any, flavour: str) -> None:
    host = make_host(flavour)
    models = host.webui / "models"
    save_network(models / "ESRGAN" / "first.safetensors", 2)
    save_network(models / "RealESRGAN" / "deep" / "second.pth", 3)
    save_network(models / "Diptych" / "third.pth", 1)
    listed = {upscaler["name"]: upscaler for upscaler in host.start().upscalers()}
    assert [listed[f"Diptych {name}"]["scale"] for name in ("first", "second", "third")] == [2, 3, 1]
    assert listed["Diptych second"]["model_path"] == str(models / "RealESRGAN" / "deep" / "second.pth")
    assert not host.reports


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_official_networks_are_listed_before_they_are_downloaded(make_host: Any, flavour: str) -> None:
    scales = {upscaler["name"]: upscaler["scale"] for upscaler in make_host(flavour).start().upscalers()}
    assert [scales[f"Diptych {name}"] for name in OFFICIAL] == [4, 4, 2, 4, 4, 4]


def test_an_official_file_that_the_host_has_already_is_used_and_not_listed_twice(make_host: Any) -> None:
    host = make_host()
    file = save_network(host.webui / "models" / "RealESRGAN" / "RealESRGAN_x4plus.pth")
    listed = [upscaler for upscaler in host.start().upscalers() if "RealESRGAN_x4plus" in upscaler["name"]]
    assert [upscaler["model_path"] for upscaler in listed if "anime" not in upscaler["name"]] == [str(file)]


def test_names_are_unique_when_two_folders_hold_files_of_one_name(make_host: Any) -> None:
    host = make_host()
    for folder in ("ESRGAN", "RealESRGAN", "Diptych"):
        save_network(host.webui / "models" / folder / "Same.pth")
    save_network(host.webui / "models" / "ESRGAN" / "same.safetensors")
    names = host.start().names()
    assert len({name.lower() for name in names}) == len(names)
    assert sum(name.lower().startswith("diptych same") for name in names) == 4


def test_files_that_are_no_networks_are_named_in_one_warning_and_the_host_starts(
    make_host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host()
    folder = host.webui / "models" / "ESRGAN"
    (folder / "empty.pth").touch()
    (folder / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (folder / "readme.txt").write_text("not even looked at")
    save_file({"some.weight": torch.zeros(2)}, folder / "other.safetensors")
    (folder / "cut.pth").write_bytes(save_network(folder / "good.pth").read_bytes()[:2000])
    with caplog.at_level(logging.WARNING):
        host.start()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert all(name in warnings[0] for name in ("empty.pth", "page.pth", "other.safetensors", "cut.pth"))
    assert "readme.txt" not in warnings[0]
    assert "Diptych good" in host.names()


def test_networks_that_diptych_itself_downloaded_are_listed_and_used(make_host: Any, tmp_path: Path) -> None:
    host = make_host()
    file = save_network(tmp_path / "home" / "upscalers" / "RealESRGAN_x2plus.pth")
    listed = {upscaler["name"]: upscaler["model_path"] for upscaler in host.start().upscalers()}
    assert listed["Diptych RealESRGAN_x2plus"] == str(file)


def test_the_prefix_and_the_folder_are_those_of_the_settings(make_host: Any, tmp_path: Path) -> None:
    save_network(tmp_path / "elsewhere" / "mine.pth")
    options = {"diptych_prefix": "GAN: ", "diptych_folder": str(tmp_path / "elsewhere")}
    names = make_host(options=options).start().names()
    assert "GAN: mine" in names
    assert not any(name.startswith("Diptych") for name in names)


def test_settings_of_another_version_are_replaced_by_defaults_and_named(
    make_host: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"diptych_tile": "huge", "diptych_border": "mirror", "diptych_prefix": 3, "diptych_compile": "yes"}
    options["diptych_batch"] = 0
    host = make_host(options=options).start()
    assert "Diptych RealESRGAN_x4plus" in host.names()
    assert caplog.text.count("the setting prefix is 3") == 1
    assert not host.reports


def test_the_host_starts_when_looking_for_networks_fails(make_host: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "a file, no folder"
    blocked.touch()
    host = make_host(options={"diptych_folder": str(blocked)}).start()
    assert "Diptych RealESRGAN_x4plus" in host.names()


def test_without_a_page_the_settings_have_their_defaults(make_host: Any) -> None:
    host = make_host().start(page=False)
    assert not hasattr(host.shared.opts, "diptych_tile")
    assert "Diptych RealESRGAN_x4plus" in host.names()


def test_the_settings_are_a_section_of_their_own(make_host: Any) -> None:
    labels = make_host().start().shared.opts.data_labels
    ours = {key: info for key, info in labels.items() if key.startswith("diptych_")}
    names = ("tile", "batch", "precision", "border", "compile", "folder", "prefix")
    assert list(ours) == [f"diptych_{name}" for name in names]
    assert {info.section for info in ours.values()} == {("diptych", "Diptych")}
    assert ours["diptych_folder"].restrict_api  # a request must not point the host at other folders
