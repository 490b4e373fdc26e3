"""Networks: every shape that is built is found again from its weights alone, in every style of keys."""

import itertools

import pytest
import torch

from diptych.errors import CheckpointError, UnknownArchitecture
from diptych.upscalers.networks import ARCHITECTURES, RRDBNet, SRVGGNetCompact, load_network


def seeded(build, **hyperparameters):
    torch.manual_seed(0)
    return build(**hyperparameters).eval()


def picture(network, side=12):
    return torch.rand(1, network.in_channels, side, side, generator=torch.Generator().manual_seed(1))


def esrgan_keys(state_dict):
    """The style of the first ESRGAN release."""
    names = {"body": "RRDB_trunk", "conv_body": "trunk_conv", "conv_hr": "HRconv"}

    def rename(key):
        stem, rest = key.split(".", 1)
        return names.get(stem, stem.replace("conv_up", "upconv")) + "." + rest.replace("rdb", "RDB")

    return {rename(key): weight for key, weight in state_dict.items()}


def old_esrgan_keys(state_dict, blocks, doublings):
    """The style of the flat lists before it, of most community files."""
    places = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    places |= {f"conv_up{n}": f"model.{3 * n}" for n in range(1, doublings + 1)}
    places |= {"conv_hr": f"model.{3 * doublings + 2}", "conv_last": f"model.{3 * doublings + 4}"}

    def rename(key):
        parts = key.split(".")
        if parts[0] == "body":
            return f"model.1.sub.{parts[1]}.{parts[2].upper()}.{parts[3]}.0.{parts[4]}"
        return f"{places[parts[0]]}.{parts[1]}"

    return {rename(key): weight for key, weight in state_dict.items()}


SRVGG_SHAPES = [
    {
        "num_feat": feat,
        "num_conv": depth,
        "upscale": scale,
        "num_in_ch": channels,
        "num_out_ch": channels,
        "act_type": act,
    }
    for feat, depth, scale, channels, act in [
        *itertools.product((4, 24), (0, 1, 5), (1, 2, 3, 4, 8), (3,), ("prelu", "relu")),
        *itertools.product((8,), (2,), (2, 4), (1, 4), ("prelu",)),
        (64, 32, 4, 3, "prelu"),
        (64, 16, 4, 3, "prelu"),
    ]
] + [{"num_feat": 8, "num_conv": 2, "upscale": 2, "num_in_ch": 1, "num_out_ch": 3, "act_type": "prelu"}]

RRDB_SHAPES = [
    {"num_feat": feat, "num_block": blocks, "num_grow_ch": grow, "scale": scale, "unshuffle": unshuffle}
    for (feat, grow), blocks, (scale, unshuffle) in itertools.product(
        ((8, 4), (12, 12)), (1, 3), ((4, 1), (8, 1), (16, 1), (2, 1), (1, 1), (2, 2), (1, 4), (1, 2), (4, 4))
    )
]


@pytest.mark.parametrize("shape", SRVGG_SHAPES, ids=str)
def test_an_srvgg_of_any_shape_is_found_from_its_weights(shape):
    original = seeded(SRVGGNetCompact, **shape)
    network = load_network(original.state_dict())
    assert network.architecture == "SRVGGNetCompact"
    assert network.hyperparameters == shape
    assert (network.scale, network.multiple) == (shape["upscale"], 1)
    x = picture(network)
    assert torch.equal(network.module(x), original(x))
    assert network.module(x).shape == (1, network.out_channels, 12 * network.scale, 12 * network.scale)


@pytest.mark.parametrize("style", ["official", "esrgan", "old esrgan"])
@pytest.mark.parametrize("shape", RRDB_SHAPES, ids=str)
def test_an_rrdbnet_of_any_shape_is_found_from_its_weights_in_every_style_of_keys(shape, style):
    original = seeded(RRDBNet, **shape)
    weights = original.state_dict()
    if style == "esrgan":
        weights = esrgan_keys(weights)
    elif style == "old esrgan":
        weights = old_esrgan_keys(weights, shape["num_block"], original.doublings)
    network = load_network(weights)
    assert network.architecture == "RRDBNet"
    assert network.hyperparameters == {"num_in_ch": 3, "num_out_ch": 3, **shape}
    assert (network.scale, network.multiple, network.in_channels) == (shape["scale"], shape["unshuffle"], 3)
    x = picture(network)
    assert torch.equal(network.module(x), original(x))
    assert network.module(x).shape == (1, 3, 12 * network.scale, 12 * network.scale)


@pytest.mark.parametrize(
    ("hyperparameters", "unshuffle"), [({}, 1), ({"scale": 2}, 2), ({"scale": 1}, 4), ({"num_block": 6}, 1)]
)
def test_the_defaults_are_the_official_real_esrgan_networks(hyperparameters, unshuffle):
    weights = RRDBNet(num_feat=8, **hyperparameters).state_dict()
    assert weights["conv_first.weight"].shape == (8, 3 * unshuffle**2, 3, 3)
    assert sum(key.startswith("conv_up") for key in weights) == 4  # two convolutions, weight and bias


def test_rebuilding_from_the_hyperparameters_gives_the_same_shapes():
    for architecture, original in ((ARCHITECTURES[0], SRVGGNetCompact()), (ARCHITECTURES[1], RRDBNet(num_block=2))):
        network = architecture.load(original.state_dict())
        again = architecture.build(**network.hyperparameters).state_dict()
        assert {key: weight.shape for key, weight in again.items()} == {
            key: weight.shape for key, weight in original.state_dict().items()
        }


def test_an_activation_that_leaves_no_weights_is_taken_from_what_is_known():
    original = seeded(SRVGGNetCompact, num_feat=8, num_conv=2, act_type="leakyrelu")
    network = load_network(original.state_dict(), act_type="leakyrelu")
    x = picture(network)
    assert torch.equal(network.module(x), original(x))
    assert network.hyperparameters["act_type"] == "leakyrelu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_loaded_as_fp32(dtype):
    original = seeded(SRVGGNetCompact, num_feat=8, num_conv=2)
    weights = {key: weight.to(dtype) for key, weight in original.state_dict().items()}
    loaded = load_network(weights).module.state_dict()
    assert all(torch.equal(loaded[key], weights[key].float()) for key in weights)


@pytest.mark.parametrize("build", [SRVGGNetCompact, RRDBNet])
def test_loaded_networks_can_be_trained(build):
    weights = seeded(build, num_feat=8, **({"num_block": 1} if build is RRDBNet else {"num_conv": 1})).state_dict()
    module = load_network(weights).module.train()
    module(torch.rand(1, 3, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert all(parameter.data_ptr() != weights[key].data_ptr() for key, parameter in module.named_parameters())


def broken(change, build=RRDBNet, **hyperparameters):
    weights = dict(seeded(build, num_feat=8, **hyperparameters).state_dict())
    change(weights)
    return weights


SMALL = {"num_block": 2, "num_grow_ch": 4}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (broken(lambda w: w.pop("body.1.rdb2.conv3.weight"), **SMALL), r"lack 'body\.1\.rdb2\.conv3\.weight'"),
        (broken(lambda w: w.pop("conv_last.weight"), **SMALL), "fit no network|lack"),
        (
            broken(lambda w: w.update({"body.0.conv1x1.weight": torch.ones(1)}), **SMALL),
            "unknown 'body.0.conv1x1.weight'",
        ),
        (broken(lambda w: w.update({"conv_hr.bias": torch.ones(9)}), **SMALL), r"'conv_hr\.bias' has the shape \(9,\)"),
        (broken(lambda w: w.update({"conv_first.weight": torch.ones(3)}), **SMALL), "no 3x3 convolutions"),
        (broken(lambda w: w.update({"body.2.weight": torch.ones(8, 8, 1, 1)}), SRVGGNetCompact), r"\(8, 8, 1, 1\)"),
        (broken(lambda w: w.update({"body.34.weight": torch.ones(47, 8, 3, 3)}), SRVGGNetCompact), "47 channels"),
        (broken(lambda w: w.pop("body.34.weight"), SRVGGNetCompact), "8 channels come out of 'body.32.weight'"),
        (broken(lambda w: w.update({"body.1.weight": torch.ones(8, 8, 3, 3)}), SRVGGNetCompact), "do not alternate"),
        (
            {"model.0.weight": torch.ones(8, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": torch.ones(4, 8, 3, 3)},
            "old ESRGAN",
        ),
        ({"encoder.weight": torch.ones(3)}, "SRVGGNetCompact .*RRDBNet"),
        ({}, "SRVGGNetCompact .*RRDBNet"),
    ],
)
def test_weights_that_fit_no_network_are_refused_with_what_would(weights, sentence):
    with pytest.raises(UnknownArchitecture, match=sentence):
        load_network(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    def poison(weights):
        weights["conv_hr.bias"] = torch.full((8,), value)

    with pytest.raises(CheckpointError, match="'conv_hr.bias' holds NaN or infinity"):
        load_network(broken(poison, **SMALL))


def test_integer_weights_are_refused():
    with pytest.raises(CheckpointError, match="torch.int64"):
        load_network(broken(lambda w: w.update({"conv_hr.bias": torch.ones(8, dtype=torch.int64)}), **SMALL))


def test_a_promise_of_huge_layers_is_refused_before_memory_is_spent():
    weights = broken(lambda w: w.update({"conv_first.weight": torch.ones(1, 1, 1, 1).expand(2**20, 3, 3, 3)}), **SMALL)
    with pytest.raises((UnknownArchitecture, CheckpointError)):
        load_network(weights)


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (RRDBNet, {"scale": 3}),
        (RRDBNet, {"scale": 0}),
        (RRDBNet, {"unshuffle": 3}),
        (SRVGGNetCompact, {"act_type": "gelu"}),
        (SRVGGNetCompact, {"num_in_ch": 3, "num_out_ch": 1}),
    ],
)
def test_impossible_hyperparameters_are_a_value_error(build, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        build(**wrong)


@pytest.mark.parametrize(("scale", "size"), [(4, (100, 300)), (2, (200, 520)), (1, (20, 64))])
def test_an_rrdbnet_gives_the_same_in_bands_as_it_trains_with_in_one_piece(scale, size):
    torch.manual_seed(0)
    network = RRDBNet(scale=scale, num_feat=8, num_block=1, num_grow_ch=4)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        in_bands = network(x)
    assert (in_bands - network(x)).abs().max() <= 1e-6
