"""The receptive radius is exact: a pixel at that distance changes the result, no pixel farther away does."""

import pytest
import torch
from torch import nn

from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact, load_network


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny convolutions spend their time in waiting for each other's threads otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_monotone(module):
    """Every weight positive: nothing that reaches an output can cancel out on the way."""
    for name, parameter in module.named_parameters():
        parameter.data.fill_(0.25 if parameter.ndim == 1 else 1 / parameter[0].numel())
        if name.endswith("bias"):
            parameter.data.zero_()
    return module.double().eval()


def seen_distance(network):
    """How far along a row an output can see, by the gradient of every output of one cell of input pixels."""
    side = 2 * network.radius + 3 * network.multiple
    side += -side % network.multiple
    height = network.multiple  # the networks treat both directions alike, so one narrow strip is enough
    x = torch.zeros(1, network.in_channels, height, side, dtype=torch.float64)
    farthest = 0
    first = side // 2 // network.multiple * network.multiple
    for pixel in range(first, first + network.multiple):
        x = x.detach().requires_grad_()
        out = network.module(x)
        out[..., pixel * network.scale : (pixel + 1) * network.scale].sum().backward()
        touched = x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
        farthest = max(farthest, pixel - int(touched.min()), int(touched.max()) - pixel)
        x.grad = None
    return farthest


@pytest.mark.parametrize("depth", [0, 1, 7, 16, 32])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_radius_of_an_srvgg_is_exact(depth, scale):
    module = make_monotone(SRVGGNetCompact(num_feat=2, num_conv=depth, upscale=scale))
    network = load_network(module.state_dict())
    network.module.double()
    assert network.radius == depth + 2 == seen_distance(network)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("scale", "unshuffle"), [(4, 1), (2, 1), (1, 1), (8, 1), (2, 2), (1, 4), (4, 2), (1, 2)])
def test_the_radius_of_an_rrdbnet_is_exact(blocks, scale, unshuffle):
    module = RRDBNet(num_feat=2, num_grow_ch=1, num_block=blocks, scale=scale, unshuffle=unshuffle)
    network = load_network(make_monotone(module).state_dict())
    network.module.double()
    assert network.radius == seen_distance(network)


@pytest.mark.parametrize(
    ("build", "hyperparameters", "radius"),
    [
        (SRVGGNetCompact, {"num_conv": 32}, 34),
        (SRVGGNetCompact, {"num_conv": 16}, 18),
        (RRDBNet, {"num_block": 23}, 349),
        (RRDBNet, {"num_block": 6}, 94),
        (RRDBNet, {"num_block": 23, "scale": 2}, 698),
    ],
)
def test_the_radii_of_the_official_networks(build, hyperparameters, radius):
    module = build(num_feat=4, **hyperparameters)
    assert load_network(module.state_dict()).radius == radius


@pytest.mark.parametrize("name", ["SRVGGNetCompact", "RRDBNet"])
def test_a_pixel_beyond_the_radius_changes_nothing_with_ordinary_weights(name):
    torch.manual_seed(0)
    module: nn.Module = (
        SRVGGNetCompact(num_feat=8, num_conv=3) if name == "SRVGGNetCompact" else RRDBNet(num_feat=8, num_block=1)
    )
    network = load_network(module.state_dict())
    side = 2 * network.radius + 9
    x = torch.rand(1, 3, side, side)
    middle = side // 2
    changed = x.clone()
    changed[..., middle, middle] += 10
    difference = (network.module(changed) - network.module(x)).abs().amax(dim=(0, 1))
    rows = difference.amax(dim=1).nonzero().flatten() // network.scale
    assert middle - network.radius <= int(rows.min()) and int(rows.max()) <= middle + network.radius
    assert int(rows.max()) - int(rows.min()) >= network.radius  # the change did spread
