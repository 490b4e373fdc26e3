"""The Automatic1111 extension: what a host gets from our networks, in every place where it upscales."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

FLAVOURS = ["a1111", "forge", "classic"]
NAME = "Diptych tiny"


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with some noise; RGBA has all values of alpha."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height, 2)
    noise = np.random.default_rng(seed).random((height, width)) * 0.1
    channels = np.stack([x, y, (x + y) / 2, 1 - x], -1) * 0.9 + noise[..., None]
    rgba = Image.fromarray((channels * 255).clip(0, 255).astype(np.uint8), "RGBA")
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


@pytest.fixture(params=FLAVOURS)
def host(request: Any, make_host: Any) -> Any:
    """A started host with one small x4 network, "Diptych tiny", which computes in fp32."""
    return started(make_host, request.param)


def started(make_host: Any, flavour: str = "a1111", scale: int = 4, **options: Any) -> Any:
    host = make_host(flavour, options={"diptych_precision": "fp32"} | {f"diptych_{k}": v for k, v in options.items()})
    write_network(host.webui / "models" / "ESRGAN" / "tiny.safetensors", scale)
    host.start()
    assert not host.reports
    return host


def write_network(path: Path, scale: int = 4, seed: int = 0) -> None:
    from diptych.upscalers.networks import SRVGGNetCompact

    torch.manual_seed(seed)
    save_file(SRVGGNetCompact(num_feat=8, num_conv=2, upscale=scale).state_dict(), path)


def whole(host: Any, image: Image.Image) -> np.ndarray:
    """The network's result on the whole picture at once, in 8 bits: (H, W, C)."""
    from diptych.upscalers.checkpoints import load_network_file

    network = load_network_file(host.webui / "models" / "ESRGAN" / "tiny.safetensors").module
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        return (network(tensor)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def press_interrupt(host: Any, after: int) -> list[str]:
    """Presses Interrupt when progress was shown `after` times; returns the texts shown from then on."""
    shown: list[str] = []
    late: list[str] = []

    def watch(text: str) -> None:
        if host.shared.state.interrupted:
            late.append(text)
        shown.append(text)
        if len(shown) == after:
            host.shared.state.interrupt()

    host.shared.state.watcher = watch
    return late


def test_extras_gives_what_the_network_gives_on_the_whole_picture(host: Any) -> None:
    image = picture(61, 47)
    result = host.extra_single_image(image, NAME, 4)
    assert result.size == (240, 184)  # the host rounds each side down to a multiple of 8
    assert result.mode == "RGB"
    exact = picture(64, 48)
    assert difference(host.extra_single_image(exact, NAME, 4), whole(host, exact)) <= 1


@pytest.mark.parametrize(("tile", "batch"), [(16, 1), (17, 3), (40, 64)])
def test_results_do_not_depend_on_the_tiles_of_the_settings(make_host: Any, tile: int, batch: int) -> None:
    host = started(make_host, tile=tile, batch=batch)
    image = picture(64, 48)
    assert difference(host.extra_single_image(image, NAME, 4), whole(host, image)) <= 1


def test_networks_are_compiled_where_the_settings_say_so(make_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    host = started(make_host)
    host.extra_single_image(picture(8, 8), NAME, 4)
    assert not compiled
    host.shared.opts.set("diptych_compile", True)
    host.extra_single_image(picture(8, 8), NAME, 4)
    assert len(compiled) == 1


@pytest.mark.parametrize("factor", [0.5, 1, 1.5, 3.3, 6])
def test_any_factor_gives_the_size_that_the_host_gives_with_its_own_upscalers(host: Any, factor: float) -> None:
    image = picture(24, 16)
    result = host.extra_single_image(image, NAME, factor)
    assert result.size == host.extra_single_image(image, "Lanczos", factor).size
    assert host.extra_single_image(image, NAME, factor, upscaler_2_name="Lanczos", upscaler_2_visibility=0.5)


def test_a_factor_that_is_more_than_the_engine_takes_at_once_is_reached(make_host: Any) -> None:
    assert started(make_host).extra_single_image(picture(3, 2), NAME, 40).size == (120, 80)


def test_rgba_keeps_its_alpha_where_the_host_hands_it_over(host: Any) -> None:
    image = picture(32, 24, "RGBA")
    result = host.extra_single_image(image, NAME, 2)
    if host.module("flavour").name == "classic":
        assert result.mode == "RGB"
        return
    assert result.mode == "RGBA"
    lanczos = host.extra_single_image(image, "Lanczos", 2)
    assert np.abs(np.asarray(result)[..., 3].astype(float) - np.asarray(lanczos)[..., 3]).mean() < 40


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(make_host: Any, mode: str) -> None:
    scaler = next(data for data in started(make_host).shared.sd_upscalers if data.name == NAME)
    image = Image.new(mode, (16, 8)) if mode == "I;16" else picture(16, 8).convert("L").convert(mode)
    result = scaler.scaler.upscale(image, 2, scaler.data_path)
    assert (result.mode, result.size) == ("RGB", (32, 16))


def test_a_picture_of_one_pixel_is_enlarged(host: Any) -> None:
    assert host.extra_single_image(picture(1, 1), NAME, 4).size == (4, 4)


def test_a_crop_that_left_nothing_is_an_error_that_says_so(make_host: Any) -> None:
    scaler = next(data for data in started(make_host).shared.sd_upscalers if data.name == NAME)
    with pytest.raises(Exception, match="0x5 pixels cannot be enlarged"):
        scaler.scaler.upscale(Image.new("RGB", (0, 5)), 2, scaler.data_path)


def test_a_picture_of_16000_pixels_is_enlarged(make_host: Any) -> None:
    assert started(make_host).extra_single_image(picture(16000, 2), NAME, 4).size == (64000, 8)


def test_hires_fix_img2img_and_sd_upscale_get_rgb_of_the_size_they_ask_for(host: Any) -> None:
    made = host.generate(width=20, height=28, hr_scale=2.5, hr_upscaler=NAME)
    assert (made.images[0].size, made.images[0].mode) == ((50, 70), "RGB")
    host.shared.opts.data["upscaler_for_img2img"] = NAME
    made = host.generate(is_img2img=True, width=48, height=40, init=picture(16, 16, "RGB"))
    assert (made.images[0].size, made.images[0].mode) == ((48, 40), "RGB")
    scripts = host.module("scripts").scripts_img2img.scripts
    sd_upscale = next(script for script in scripts if script.title() == "SD upscale")
    assert sd_upscale.run(picture(16, 16), NAME, 2.0).size == (32, 32)
    assert not host.reports


def test_progress_is_shown_and_cleared(host: Any) -> None:
    shown: list[str] = []
    host.shared.state.watcher = shown.append
    host.extra_single_image(picture(32, 32), NAME, 4)
    assert shown[-1].startswith("Diptych tiny 32x32 x4: 100 %")
    assert host.shared.state.textinfo is None


@pytest.mark.parametrize("tile", [16, 0], ids=["between two tiles", "within a tile as large as the picture"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_interrupt_stops_at_once_and_the_next_request_is_served_anew(make_host: Any, flavour: str, tile: int) -> None:
    host = started(make_host, flavour, tile=tile)
    image = picture(64, 64)
    late = press_interrupt(host, after=5)
    interrupted = host.extra_single_image(image, NAME, 4)
    assert interrupted.size == (256, 256)
    assert len(late) <= 1
    host.shared.state.watcher = None
    assert difference(host.extra_single_image(image, NAME, 4), whole(host, image)) <= 1
    assert difference(interrupted, whole(host, image)) > 1


def test_a_finished_result_is_still_remembered_by_the_host(make_host: Any) -> None:
    host = started(make_host)
    image = picture(16, 16)
    first = host.extra_single_image(image, NAME, 4)
    assert host.extra_single_image(image, NAME, 4) is first


def test_a_result_made_with_other_settings_is_not_served_again(make_host: Any) -> None:
    host = started(make_host)
    image = picture(16, 16)
    zero = host.extra_single_image(image, NAME, 4)
    host.shared.opts.set("diptych_border", "wrap")
    assert difference(host.extra_single_image(image, NAME, 4), zero) > 1
    host.shared.opts.set("diptych_border", "zero")
    assert difference(host.extra_single_image(image, NAME, 4), zero) == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "replaced by another kind"])
def test_a_network_that_cannot_be_loaded_is_an_error_and_never_the_input(host: Any, damage: str) -> None:
    path = host.webui / "models" / "ESRGAN" / "tiny.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        save_file({"some.weight": torch.zeros(3)}, path)
    with pytest.raises(Exception, match="tiny.safetensors"):
        host.extra_single_image(picture(16, 16), NAME, 4)


def test_a_file_that_was_replaced_is_loaded_anew(make_host: Any) -> None:
    host = started(make_host)
    image = picture(16, 16)
    before = host.extra_single_image(image, NAME, 4)
    write_network(host.webui / "models" / "ESRGAN" / "tiny.safetensors", seed=1)
    host.shared.opts.set("diptych_tile", 16)  # else the host serves what it remembers
    after = host.extra_single_image(image, NAME, 4)
    assert difference(before, after) > 1
    assert difference(after, whole(host, image)) <= 1


def test_an_official_network_that_cannot_be_downloaded_says_which_file_to_put_where(
    make_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    host = started(make_host)
    with pytest.raises(Exception, match="realesr-animevideov3.pth") as caught:
        host.extra_single_image(picture(16, 16), "Diptych realesr-animevideov3", 4)
    assert str(host.webui / "models" / "Diptych") in str(caught.value)
    assert "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d" in str(caught.value)


def test_a_models_folder_that_cannot_be_written_says_so(make_host: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.touch()
    host = started(make_host, folder=str(blocked / "below"))
    with pytest.raises(Exception, match="blocked"):
        host.extra_single_image(picture(16, 16), "Diptych realesr-animevideov3", 4)


def test_no_half_is_about_gpus_and_leaves_a_cpu_alone(make_host: Any, caplog: pytest.LogCaptureFixture) -> None:
    host = started(make_host, precision="auto")
    host.shared.cmd_opts.no_half = True
    with caplog.at_level(logging.WARNING):
        assert host.extra_single_image(picture(16, 16), NAME, 4).size == (64, 64)
    assert not caplog.records
