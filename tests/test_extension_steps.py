"""The extension's Extras operation "Diptych finish", and its section "Diptych" in txt2img and img2img."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

FLAVOURS = ["a1111", "forge", "classic"]
NAME = "Diptych tiny"
ON = {"enabled": True, "network": NAME}


@pytest.fixture(params=FLAVOURS)
def host(request: Any, make_host: Any) -> Any:
    """A started host with one small x4 network, "Diptych tiny", which computes in fp32."""
    return started(make_host, request.param)


def started(make_host: Any, flavour: str = "a1111", options: dict[str, Any] | None = None) -> Any:
    from diptych.upscalers.networks import SRVGGNetCompact

    host = make_host(flavour, options={"diptych_precision": "fp32"} | (options or {}))
    torch.manual_seed(0)
    network = SRVGGNetCompact(num_feat=8, num_conv=2, upscale=4)
    save_file(network.state_dict(), host.webui / "models" / "ESRGAN" / "tiny.safetensors")
    host.start()
    assert not host.reports
    return host


def picture(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def section(host: Any, is_img2img: bool = False) -> Any:
    scripts = host.module("scripts")
    runner = scripts.scripts_img2img if is_img2img else scripts.scripts_txt2img
    return next(script for script in runner.scripts if script.title() == "Diptych")


def test_the_operation_finishes_after_the_hosts_own_upscaling(host: Any) -> None:
    upscale = {"upscale_by": 2.0, "upscaler_1_name": "Lanczos"}
    pp = host.extras(picture(), {"Upscale": upscale, "Diptych finish": {**ON, "scale": 3.0}})
    assert pp.image.size == (24 * 2 * 3, 16 * 2 * 3)
    assert pp.info["Postprocess Diptych network"] == NAME
    assert pp.info["Postprocess Diptych scale"] == 3.0


@pytest.mark.parametrize("values", [{}, {"network": NAME}, {"enabled": False, "network": NAME}, {"enabled": True}])
def test_arguments_that_arrive_as_none_mean_off(host: Any, values: dict[str, Any]) -> None:
    image = picture()
    pp = host.extras(image, {"Diptych finish": values})
    assert pp.image is image
    assert pp.info == {}


def test_alpha_is_kept_or_dropped_as_asked(host: Any) -> None:
    image = picture(mode="RGBA")
    hosts_give = "RGB" if host.module("flavour").name == "classic" else "RGBA"
    assert host.extras(image, {"Diptych finish": ON}).image.mode == hosts_give
    assert host.extras(image, {"Diptych finish": {**ON, "keep_alpha": False}}).image.mode == "RGB"


def test_tileable_results_repeat_without_a_seam(host: Any) -> None:
    image = picture(16, 16)
    twice = Image.new("RGB", (48, 48))
    for x in (0, 16, 32):
        for y in (0, 16, 32):
            twice.paste(image, (x, y))
    result = host.extras(image, {"Diptych finish": {**ON, "scale": 4.0, "tileable": True}}).image
    middle = host.extras(twice, {"Diptych finish": {**ON, "scale": 4.0}}).image.crop((64, 64, 128, 128))
    assert np.abs(np.asarray(result).astype(int) - np.asarray(middle)).max() <= 1


def test_an_unknown_network_is_an_error_that_names_those_there_are(host: Any) -> None:
    with pytest.raises(Exception, match="no network called 'Diptych nothing'.*Diptych tiny"):
        host.extras(picture(), {"Diptych finish": {"enabled": True, "network": "Diptych nothing"}})


def test_an_interrupted_finish_leaves_the_picture_without_the_parameters_of_a_finished_one(host: Any) -> None:
    host.shared.state.watcher = lambda text: host.shared.state.interrupt()
    image = picture(64, 64)
    host.shared.opts.set("diptych_tile", 16)
    pp = host.extras(image, {"Diptych finish": ON})
    assert pp.image is image
    assert pp.info == {}


def test_the_operation_works_on_generated_pictures_where_the_user_enables_it(make_host: Any) -> None:
    host = started(make_host, options={"postprocessing_enable_in_main_ui": ["Diptych finish"]})
    made = host.generate(width=24, height=16, scripts={"Diptych finish": [True, NAME, 2.0]})
    assert made.images[0].size == (48, 32)
    assert "Postprocess Diptych network: Diptych tiny" in made.infotexts[0]


@pytest.mark.parametrize("is_img2img", [False, True])
def test_the_section_finishes_every_picture_and_writes_the_parameters(host: Any, is_img2img: bool) -> None:
    made = host.generate(is_img2img, width=24, height=16, batch_size=2, scripts={"Diptych": [True, NAME, 3.0]})
    assert [image.size for image in made.images] == [(72, 48)] * 2
    assert all(text.endswith("Diptych network: Diptych tiny, Diptych scale: 3.0") for text in made.infotexts)
    assert made.comments == ""
    assert not host.reports


def test_the_section_is_off_until_it_is_switched_on(host: Any) -> None:
    made = host.generate(width=24, height=16)
    assert made.images[0].size == (24, 16)
    assert "Diptych" not in made.infotexts[0]


def test_parameters_are_pasted_back(host: Any) -> None:
    values = [True, NAME, 2.5, 0.5, "reflect", True, False]
    made = host.generate(scripts={"Diptych": [*values[:3], 1.0, *values[4:]]})
    text = made.infotexts[0].replace("Diptych border", "Diptych denoise: 0.5, Diptych border")
    controls = section(host).controls
    host.module("infotext_utils").paste(text, section(host).infotext_fields)
    assert [control.value for control in controls] == values


def test_parameters_of_a_picture_without_diptych_switch_the_section_off(host: Any) -> None:
    fields = section(host).infotext_fields
    host.module("infotext_utils").paste(
        "a prompt\nSteps: 1, Diptych network: Diptych tiny, Diptych border: wrap", fields
    )
    host.module("infotext_utils").paste("a prompt\nSteps: 1, Seed: 5", fields)
    controls = section(host).controls
    assert [control.value for control in controls][:1] == [False]
    assert controls[4].value == "as in Settings"


def test_a_failure_is_told_under_the_picture_and_in_its_parameters(host: Any) -> None:
    (host.webui / "models" / "ESRGAN" / "tiny.safetensors").write_bytes(b"damaged")
    made = host.generate(width=24, height=16, scripts={"Diptych": [True, NAME, 2.0]})
    assert "Diptych did not finish the picture" in made.comments
    assert "tiny.safetensors" in made.comments
    assert "Diptych error" in made.infotexts[0]
    assert "Diptych network" not in made.infotexts[0]
    assert host.reports


def test_pictures_after_an_interrupt_do_not_claim_to_be_finished(make_host: Any) -> None:
    host = started(make_host, options={"diptych_tile": 16})
    shown: list[str] = []

    def watch(text: str) -> None:
        shown.append(text)
        if len([text for text in shown if "100 %" in text]) == 1 and "100 %" not in text:
            host.shared.state.interrupt()  # when the second picture has begun

    host.shared.state.watcher = watch
    made = host.generate(width=64, height=64, batch_size=2, scripts={"Diptych": [True, NAME, 2.0]})
    assert [image.size for image in made.images] == [(128, 128), (64, 64)]
    assert ["Diptych network" in text for text in made.infotexts] == [True, False]


def test_a_mask_composite_that_the_host_cannot_make_is_prevented_and_explained(make_host: Any) -> None:
    host = started(make_host, options={"return_mask_composite": True})
    mask = Image.new("L", (24, 16), 255)
    made = host.generate(True, width=24, height=16, mask=mask, scripts={"Diptych": [True, NAME, 2.0]})
    assert made.images[0].size == (24, 16)
    assert "return_mask_composite" in made.comments


def test_the_plot_has_our_axes_once_and_they_overrule_the_section(host: Any) -> None:
    host.reload_ui()
    data = next(data for data in host.module("scripts").scripts_data if data.script_class.__module__ == "xyz_grid.py")
    axes = {option.label: option for option in data.module.axis_options if option.label.startswith("[Diptych]")}
    assert len(axes) == len([option for option in data.module.axis_options if "[Diptych]" in option.label]) == 4
    assert NAME in axes["[Diptych] Network"].choices()

    from modules import processing

    p = processing.Processing(width=24, height=16)
    axes["[Diptych] Network"].apply(p, NAME, [])
    axes["[Diptych] Scale"].apply(p, 4.0, [])
    runner = host.module("scripts").scripts_txt2img
    p.script_args = [getattr(component, "value", 0) for component in runner.inputs]
    made = processing.process_images(p, runner)
    assert made.images[0].size == (96, 64)


def test_building_the_controls_twice_changes_nothing(host: Any) -> None:
    first = [control.value for control in section(host).ui(False)]
    assert [control.value for control in section(host).ui(False)] == first
    assert Path(host.webui / "models" / "Diptych").exists() is False
