"""The service under programs that we did not write, and under many at once."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

ROOT = Path(__file__).resolve().parent.parent


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_many_clients_at_once_each_get_their_own(web_server):
    load = benchmark("service_load")
    tally = load.run(web_server.url, os.getpid(), clients=10, seconds=3)
    assert tally.wrong == []
    assert sum(tally.done.values()) >= 10  # as many as there are clients


@pytest.fixture(scope="module")
def webuiapi():
    return pytest.importorskip("webuiapi", reason="pip install webuiapi requests")


@pytest.fixture(scope="module")
def client(webuiapi, web_server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=web_server.port, sampler="Euler a", steps=2)


def test_webuiapi_draws_and_reads_its_settings_back(client):
    made = client.txt2img(prompt="a red cat", negative_prompt="blur", seed=1003, width=64, height=64, cfg_scale=7)
    assert made.image.size == (64, 64) and made.info["seed"] == 1003
    assert made.info["sampler_name"] == "Euler a"
    assert client.png_info(made.image).info == made.info["infotexts"][0]


def test_webuiapi_draws_from_pictures_and_masks(client):
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "white")
    made = client.img2img(images=[picture], prompt="a cat", seed=5, width=64, height=64, denoising_strength=0.6)
    painted = client.img2img(
        images=[picture], mask_image=mask, inpainting_fill=1, prompt="a cat", seed=5, width=64, height=64
    )
    assert made.image.size == painted.image.size == (64, 64)


def test_webuiapi_draws_with_hires(client):
    made = client.txt2img(
        prompt="a cat", seed=5, width=64, height=64, enable_hr=True, hr_scale=2, hr_upscaler="None",
        hr_second_pass_steps=4, denoising_strength=0.4,
    )  # fmt: skip
    assert made.image.size == (128, 128)


def test_webuiapi_enlarges(client, webuiapi):
    picture = Image.new("RGB", (20, 10), "red")
    one = client.extra_single_image(image=picture, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=1.5)
    many = client.extra_batch_images(images=[picture] * 2, upscaler_1="Nearest", upscaling_resize=2)
    assert one.image.size == (30, 15) and [image.size for image in many.images] == [(40, 20)] * 2


def test_webuiapi_reads_the_lists_and_sets_options(client):
    assert "tiny-model" in client.util_get_model_names() and client.util_get_current_model() == "tiny-model"
    assert "Euler a" in client.util_get_sampler_names() and "karras" in client.util_get_scheduler_names()
    assert [item["name"] for item in client.get_upscalers()][0] == "None"
    for question in (client.get_sd_vae, client.get_loras, client.get_hypernetworks, client.get_face_restorers,
                     client.get_realesrgan_models, client.get_prompt_styles):  # fmt: skip
        assert question() == []
    assert client.get_memory()["ram"] and client.get_cmd_flags()["api"] and client.get_scripts()["txt2img"] == []
    options = client.get_options()
    client.set_options({"samples_format": "png"})
    client.util_set_model("tiny", find_closest=True)
    assert client.get_options() == options
    assert client.refresh_checkpoints() is None and client.interrupt() == {} and client.skip() is None
    client.util_wait_for_ready(check_interval=0.1)


@pytest.fixture(scope="module")
def api_schema(web_server):
    schema = schemathesis.openapi.from_url(web_server.url + "/openapi.json")
    schema.config.update(base_url=web_server.url)
    return schema


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_the_description_allows_or_forbids_is_answered_as_described(api_schema, mode):
    for found in api_schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            if isinstance(case.body, dict):
                for name, most in (("steps", 2), ("width", 64), ("height", 64), ("n_iter", 1), ("batch_size", 1)):
                    value = case.body.get(name, most)
                    if isinstance(value, int) and not isinstance(value, bool) and value > most:
                        case.body[name] = most  # a valid wish, only quicker to grant
            case.call_and_validate(checks=CHECKS, timeout=60)

        try:
            check()
        except Unsatisfiable:
            continue  # an operation without parameters cannot be asked wrongly
