"""Tiles change nothing: what is computed in pieces equals what is computed whole."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.upscalers.engine import output_size, passes_needed, upscale_rows, upscale_tensor
from diptych.upscalers.networks import RRDBNet, load_network
from diptych.upscalers.passes import Model
from diptych.upscalers.resize import Axis, lanczos_rows
from diptych.upscalers.sources import ArraySource, StripSource, TensorSource

SIZES = [(1, 1), (5, 7), (37, 50)]


def picture(height, width, batch=1, channels=3, seed=0):
    return torch.rand((batch, channels, height, width), generator=torch.Generator().manual_seed(seed))


def whole(network, x, border="zero"):
    """The network in one piece, with the border laid around the picture by hand."""
    height, width = x.shape[2:]
    multiple, around = network.multiple, 0 if border == "zero" else network.radius + network.multiple
    around = -(-around // multiple) * multiple
    bottom, right = around + -height % multiple, around + -width % multiple
    pads = ((0, 0), (0, 0), (around, bottom), (around, right))
    padded = torch.from_numpy(np.pad(x.numpy(), pads, mode="wrap" if border == "wrap" else "reflect"))
    with torch.no_grad():
        out = network.module(padded).clamp(0, 1)
    top = around * network.scale
    return out[:, :, top : top + height * network.scale, top : top + width * network.scale]


def tiled(network, x, **options):
    with torch.no_grad():
        return upscale_tensor(
            network.module, x, scale=network.scale, halo=network.radius, multiple=network.multiple, **options
        )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("depth", "scale"), [(0, 4), (3, 2), (16, 4), (32, 1)])
@pytest.mark.parametrize("border", ["zero", "reflect", "wrap"])
def test_srvgg_in_tiles_equals_srvgg_whole(make_srvgg, depth, scale, size, border):
    network = make_srvgg(num_conv=depth, upscale=scale)
    x = picture(*size)
    expected = whole(network, x, border)
    for tile in (23, "auto"):
        assert (tiled(network, x, tile=tile, border=border) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(1, 1), (37, 30)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("border", ["zero", "reflect"])
def test_rrdb_in_tiles_equals_rrdb_whole_whatever_its_pixel_unshuffle(scale, size, border):
    torch.manual_seed(scale)
    network = load_network(RRDBNet(scale=scale, num_feat=8, num_block=1, num_grow_ch=4).state_dict())
    x = picture(*size)
    expected = whole(network, x, border)
    for tile in (16, 23):
        assert (tiled(network, x, tile=tile, border=border) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("out_scale", [4, 6, 1.5])
def test_a_tileable_texture_stays_tileable_at_any_scale(make_srvgg, out_scale):
    network = make_srvgg(num_conv=1)
    x = picture(20, 26)
    straight = tiled(network, x, tile=17, border="wrap", out_scale=out_scale)
    rolled = tiled(network, x.roll((4, 6), (2, 3)), tile=20, border="wrap", out_scale=out_scale)
    shift = (int(4 * out_scale), int(6 * out_scale))
    assert (straight.roll(shift, (2, 3)) - rolled).abs().max() <= 2e-6


def test_pictures_of_a_batch_are_those_of_each_alone(make_srvgg):
    network = make_srvgg()
    x = picture(40, 30, batch=5)
    together = tiled(network, x, tile=16)
    alone = torch.cat([tiled(network, one[None]) for one in x])
    assert (together - alone).abs().max() <= 1e-6


@pytest.mark.parametrize("border", ["zero", "wrap"])
@pytest.mark.parametrize("batch", [2, 3, 100])
def test_tiles_that_go_through_the_network_together_change_nothing(make_srvgg, batch, border):
    network, calls = make_srvgg(), []
    x = picture(20, 150, batch=2)

    def compute(tile):
        calls.append(len(tile))
        return network.module(tile)

    options = {"scale": network.scale, "halo": network.radius, "tile": 16, "border": border}
    with torch.no_grad():
        out = upscale_tensor(compute, x, batch=batch, **options)
    assert (out - whole(network, x, border)).abs().max() <= 1e-6
    inner = 10 if border == "wrap" else 8  # with zeros outside, the tiles at both ends read less
    assert max(calls) == 2 * min(batch, inner)


def test_two_passes_equal_the_network_run_twice_and_the_rest_is_pillows_lanczos(make_srvgg):
    network = make_srvgg(num_conv=1)
    x = picture(10, 8)
    twice = whole(network, whole(network, x))
    assert (tiled(network, x, tile=16, out_scale=16) - twice).abs().max() <= 2e-6
    result = tiled(network, x, tile=16, out_scale=10)
    for plane, expected in zip(result[0], twice[0], strict=True):
        image = Image.fromarray(expected.numpy())
        resized = np.asarray(image.resize((80, 100), Image.Resampling.LANCZOS)).clip(0, 1)
        assert np.abs(plane.numpy() - resized).max() <= 3e-6


@pytest.mark.parametrize("sizes", [(50, 70, 25, 35), (50, 70, 131, 35), (1, 1, 5, 5), (200, 100, 7, 3), (5, 7, 99, 98)])
def test_lanczos_by_strips_equals_pillows(sizes):
    height, width, out_height, out_width = sizes
    plane = np.random.default_rng(0).random((height, width), dtype=np.float32)
    expected = np.asarray(Image.fromarray(plane).resize((out_width, out_height), Image.Resampling.LANCZOS))
    for rows in (1, 7, height):
        strips = torch.from_numpy(plane)[None, None].split(rows, 2)
        out = torch.cat(list(lanczos_rows(strips, Axis(height, out_height), Axis(width, out_width))), 2)
        assert np.abs(out[0, 0].numpy() - expected).max() <= 2e-6


@pytest.mark.parametrize("border", ["zero", "reflect"])
@pytest.mark.parametrize("out_scale", [2, 3, 4])
def test_rows_that_come_one_by_one_give_the_same_as_a_picture_in_memory(make_srvgg, border, out_scale):
    network = make_srvgg(num_conv=4, upscale=2)
    x = picture(61, 30)
    model = Model(network.module, network.scale, network.radius)
    for rows in (1, 7, 61):
        source = StripSource(iter(x.split(rows, 2)), 1, 61, 30)
        with torch.no_grad():
            out = torch.cat(list(upscale_rows(model, source, out_scale, tile=16, border=border)), 2)
            expected = torch.cat(list(upscale_rows(model, TensorSource(x), out_scale, tile=16, border=border)), 2)
        assert torch.equal(out, expected)


def test_a_strip_source_holds_no_more_rows_than_the_halo_and_a_row_of_tiles(make_srvgg):
    network = make_srvgg(num_conv=2)
    model = Model(network.module, network.scale, network.radius)
    given = itertools.count()
    source = StripSource((picture(1, 20) for _ in given), 1, 400, 20)
    most = 0
    for done, strip in enumerate(upscale_rows(model, source, 4, tile=16), 1):
        assert strip.shape[2] <= 16 * 4
        most = max(most, next(given) - 16 * (done - 1))
    assert most <= 16 + 2 * network.radius + done


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_array_is_read_as_the_same_numbers(dtype):
    array = (
        np.random.default_rng(0).random((1, 6, 5, 3)) * (1 if dtype == np.float32 else np.iinfo(dtype).max)
    ).astype(dtype)
    rows = ArraySource(array).rows(2, 5)
    largest = 1 if dtype == np.float32 else np.iinfo(dtype).max
    assert torch.equal(rows, torch.from_numpy((array[:, 2:5].astype(np.float32) / largest).transpose(0, 3, 1, 2)))


def test_the_size_is_rounded_and_never_nothing():
    assert output_size(3, 5, 2.5) == (8, 13)
    assert output_size(1, 100, 0.1) == (1, 10)


@pytest.mark.parametrize(("scale", "count"), [(0.1, 1), (1, 1), (4, 1), (4.01, 2), (16, 2), (32, 3)])
def test_the_network_runs_as_often_as_the_scale_needs(scale, count):
    assert passes_needed(4, scale) == count
    assert passes_needed(1, scale) == 1
