"""The GAN upscaler as a component of a diffusers pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import CheckpointError, ModelNotFound
from diptych.pipelines import DiptychUpscaler
from diptych.upscalers import Upscaler
from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact

NETWORKS = [
    ("SRVGGNetCompact", SRVGGNetCompact, {"num_feat": 8, "num_conv": 2, "upscale": 3}),
    ("RRDBNet", RRDBNet, {"num_feat": 8, "num_block": 1, "num_grow_ch": 4, "scale": 2}),
]


@pytest.mark.parametrize(
    ("name", "network", "shape"), NETWORKS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_folder_holds_the_networks_own_keys_and_is_read_back(
    name: str, network: Any, shape: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    upscaler = DiptychUpscaler(name, **shape).eval()
    upscaler.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == network(**shape).state_dict().keys()
    picture = torch.rand(2, 3, 12, 10)
    expected = upscaler(picture)
    again = DiptychUpscaler.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(picture), expected)
    assert again.network.scale == upscaler.network.scale == expected.shape[-1] // 10
    assert torch.equal(Upscaler.from_pretrained(tmp_path).network.module(picture), expected)


def test_a_file_of_any_upscaler_becomes_a_component(tmp_path: Path) -> None:
    network = SRVGGNetCompact(num_feat=8, num_conv=1, upscale=2).eval()
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    picture = torch.rand(1, 3, 8, 8)
    assert torch.equal(DiptychUpscaler.from_name(tmp_path / "mine.safetensors")(picture), network(picture))


def test_half_precision_reaches_the_network_and_pictures_keep_their_own() -> None:
    upscaler = DiptychUpscaler("SRVGGNetCompact", num_feat=8, num_conv=1).to(torch.bfloat16)
    assert {weight.dtype for weight in upscaler.network.module.parameters()} == {torch.bfloat16}
    assert upscaler(torch.rand(1, 3, 8, 8)).dtype is torch.float32
    assert upscaler.widen() and upscaler.dtype is torch.float32 and not upscaler.widen()


def test_what_is_no_upscaler_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no upscaler architecture is called 'Nothing': use SRVGGNetCompact"):
        DiptychUpscaler("Nothing")
    with pytest.raises(ModelNotFound, match="no-such-name"):
        DiptychUpscaler.from_name("no-such-name")
