"""On a GPU, wherever there is one: the same pictures, whatever precision, tiles and memory."""

import numpy as np
import pytest
import torch

from diptych.upscalers import Upscaler
from diptych.upscalers.runner import Runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def picture(height=90, width=130):
    return torch.rand((3, height, width), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", [{}, {"tile": 32}, {"tile": 16, "batch": 4}, {"tile": 24, "border": "wrap"}], ids=str
)
def test_a_gpu_gives_the_picture_of_the_cpu_in_fp32(make_srvgg, options):
    network = make_srvgg(num_conv=8)
    border = {"border": options["border"]} if "border" in options else {}
    expected = Upscaler(network, device="cpu", dtype="fp32").upscale(picture(), **border)
    upscaler = Upscaler(network, device="cuda", dtype="fp32")
    assert (upscaler.upscale(picture(), **options) - expected).abs().max() <= 1e-5
    assert (upscaler.upscale(picture().cuda(), **options).cpu() - expected).abs().max() <= 1e-5


def test_half_precision_is_chosen_and_gives_forty_decibels(make_srvgg):
    network = make_srvgg(num_conv=8)
    expected = Upscaler(network, device="cpu", dtype="fp32").upscale(picture())
    upscaler = Upscaler(network, device="cuda")
    assert upscaler.dtype is torch.float16
    error = (upscaler.upscale(picture(), tile=32) - expected).square().mean().item()
    assert -10 * np.log10(error) >= 40 and upscaler.dtype is torch.float16


def test_a_tile_that_overflows_in_fp16_is_computed_again_in_fp32(make_srvgg):
    network = make_srvgg(num_conv=2)
    with torch.no_grad():
        network.module.body[0].weight *= 1e5
        network.module.body[-1].weight *= 1e-5
    expected = Upscaler(network, device="cpu", dtype="fp32").upscale(picture())
    upscaler = Upscaler(network, device="cuda", dtype="fp16")
    assert (upscaler.upscale(picture(), tile=32) - expected).abs().max() <= 1e-4
    assert upscaler.dtype is torch.float32


def test_memory_that_runs_out_on_the_gpu_makes_tiles_smaller(make_srvgg, monkeypatch):
    network, seen = make_srvgg(), []
    expected = Upscaler(network, device="cpu", dtype="fp32").upscale(picture())
    compute = Runner.__call__

    def small_gpu(self, tile):
        seen.append(tile[:, 0].numel())
        if seen[-1] > 4000:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return compute(self, tile)

    monkeypatch.setattr(Runner, "__call__", small_gpu)
    out = Upscaler(network, device="cuda", dtype="fp32").upscale(picture())
    assert (out - expected).abs().max() <= 1e-5 and max(seen) > 4000 and min(seen) <= 4000


def test_a_compiled_network_gives_the_same_on_a_gpu(make_srvgg):
    pytest.importorskip("triton")
    network = make_srvgg(num_conv=2)
    plain = Upscaler(network, device="cuda", dtype="fp16").upscale(picture(), tile=40)
    compiled = Upscaler(network, device="cuda", dtype="fp16", compile=True).upscale(picture(), tile=40)
    assert (plain - compiled).abs().max() <= 1e-2
