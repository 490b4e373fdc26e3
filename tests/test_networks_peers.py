"""Equality with the packages that defined these files: basicsr's networks, spandrel's readings of the same weights.

Both are optional, need torchvision and are skipped where they are not installed.
"""

import importlib
import sys
import types

import pytest
import torch

from diptych.errors import UnknownArchitecture
from diptych.upscalers.checkpoints import load_network_file
from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact, load_network

SRVGG_SHAPES = [
    {"num_feat": 64, "num_conv": 32, "upscale": 4},
    {"num_feat": 64, "num_conv": 16, "upscale": 4},
    {"num_feat": 24, "num_conv": 8, "upscale": 2},
    {"num_feat": 16, "num_conv": 4, "upscale": 3},
    {"num_feat": 16, "num_conv": 4, "upscale": 1},
]
RRDB_SHAPES = [
    {"scale": 4, "num_feat": 64, "num_block": 6, "num_grow_ch": 32},
    {"scale": 4, "num_feat": 64, "num_block": 23, "num_grow_ch": 32},
    {"scale": 2, "num_feat": 64, "num_block": 3, "num_grow_ch": 32},
    {"scale": 1, "num_feat": 32, "num_block": 2, "num_grow_ch": 32},
]
NETWORKS = [(SRVGGNetCompact, shape) for shape in SRVGG_SHAPES] + [(RRDBNet, shape) for shape in RRDB_SHAPES]
NETWORK = pytest.mark.parametrize(("build", "shape"), NETWORKS, ids=str)


def seeded(build, **hyperparameters):
    torch.manual_seed(0)
    return build(**hyperparameters).eval()


def picture():
    return torch.rand(1, 3, 24, 20, generator=torch.Generator().manual_seed(1))


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item())


@pytest.fixture(scope="module")
def basicsr():
    """basicsr 1.4.2 asks for a torchvision module that is gone since 0.17; a module of that name is enough."""
    functional = pytest.importorskip("torchvision.transforms.functional", exc_type=(ImportError, RuntimeError))
    missing = types.ModuleType("torchvision.transforms.functional_tensor")
    missing.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules.setdefault(missing.__name__, missing)
    pytest.importorskip("basicsr", reason="basicsr is not installed")
    return {
        SRVGGNetCompact: importlib.import_module("basicsr.archs.srvgg_arch").SRVGGNetCompact,
        RRDBNet: importlib.import_module("basicsr.archs.rrdbnet_arch").RRDBNet,
    }


@pytest.fixture(scope="module")
def spandrel():
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    return pytest.importorskip("spandrel", reason="spandrel is not installed")


@NETWORK
def test_files_that_basicsr_writes_give_basicsrs_pictures(tmp_path, basicsr, build, shape):
    theirs = seeded(basicsr[build], num_in_ch=3, num_out_ch=3, **shape)
    torch.save({"params_ema": theirs.state_dict()}, tmp_path / "net.pth")
    network = load_network_file(tmp_path / "net.pth")
    assert network.scale == shape.get("scale", shape.get("upscale"))
    with torch.no_grad():
        assert_equal(network.module(picture()), theirs(picture()))


@NETWORK
def test_files_that_we_write_are_read_by_basicsr(tmp_path, basicsr, build, shape):
    ours = seeded(build, **shape)
    torch.save({"params_ema": ours.state_dict()}, tmp_path / "net.pth")
    theirs = basicsr[build](num_in_ch=3, num_out_ch=3, **shape)
    theirs.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True)["params_ema"], strict=True)
    with torch.no_grad():
        assert_equal(ours(picture()), theirs.eval()(picture()))


@NETWORK
def test_spandrel_reads_the_same_network_from_the_same_weights(spandrel, build, shape):
    network = load_network(seeded(build, **shape).state_dict())
    theirs = spandrel.ModelLoader(device="cpu").load_from_state_dict(dict(network.module.state_dict()))
    assert (network.scale, network.in_channels, network.out_channels) == (
        theirs.scale,
        theirs.input_channels,
        theirs.output_channels,
    )
    with torch.no_grad():
        assert_equal(network.module(picture()), theirs.model(picture()))


def test_a_family_that_only_spandrel_knows_is_loaded_through_it(tmp_path, spandrel):
    architecture = importlib.import_module("spandrel.architectures.SPAN")
    theirs = seeded(architecture.SPAN, num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2)
    torch.save({"params": theirs.state_dict()}, tmp_path / "span.pth")
    network = load_network_file(tmp_path / "span.pth")
    assert (network.architecture, network.scale, network.radius) == ("SPAN", 2, None)
    with torch.no_grad():
        assert network.module(picture()).shape == (1, 3, 48, 40)
        assert_equal(network.module(picture()), theirs(picture()).clamp(0, 1))


def test_what_spandrel_does_not_know_either_is_refused_with_what_would_fit(spandrel):
    with pytest.raises(UnknownArchitecture, match="SRVGGNetCompact.*RRDBNet"):
        load_network({"some.weight": torch.ones(1)})
