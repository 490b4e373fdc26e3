"""The autoencoder in strips gives what the whole one gives, whatever is cut where and wherever it waits."""

import threading
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diptych.errors import Cancelled, DiptychError, OutOfMemory
from diptych.pipelines import strips
from diptych.pipelines.strips import decode_strips, encode_strips, runs_in_strips
from diptych.upscalers.sources import TensorSource


def autoencoder(levels: int = 3, attention: bool = True, layers: int = 1, quant: bool = True) -> Any:
    torch.manual_seed(levels)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    return vae.eval()


def latents(height: int = 7, width: int = 5) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a few rows, from the lowest level on."""
    monkeypatch.setattr(strips, "_WHOLE_BYTES", 0)
    monkeypatch.setitem(strips._STRIP_BYTES, "cpu", 1000)


def levels_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of pictures in -1..1, in levels of 8 bits."""
    return (one.float() - other.float()).abs().max().item() * 127.5


@pytest.mark.parametrize("shape", [(2, False, 1, True), (3, False, 1, True), (4, True, 2, True), (4, True, 1, False)])
@pytest.mark.parametrize("budget", [None, 0, 20_000])
@torch.no_grad()
def test_strips_decode_and_encode_as_the_whole_does(thin: None, shape: Any, budget: int | None) -> None:
    vae = autoencoder(*shape)
    made = list(decode_strips(vae, latents(), budget=budget))
    whole = vae.decode(latents()).sample
    assert len(made) > 3 and levels_apart(torch.cat(made, 2), whole) < 0.01
    picture = torch.rand(whole.shape, generator=torch.Generator().manual_seed(1))
    moments = vae.encode(picture * 2 - 1).latent_dist.parameters
    assert torch.allclose(encode_strips(vae, TensorSource(picture), budget=budget), moments, atol=1e-4)


@torch.no_grad()
def test_in_bf16_strips_are_no_further_from_fp32_than_the_whole_is(thin: None) -> None:
    vae = autoencoder(4, layers=2)
    exact = vae.decode(latents()).sample
    half = torch.nn.Module.to(vae, torch.bfloat16)
    whole, made = half.decode(latents().bfloat16()).sample, torch.cat(list(decode_strips(half, latents())), 2)

    def error(picture: torch.Tensor) -> float:
        return (picture.float() - exact).square().mean().sqrt().item()

    assert made.dtype is torch.bfloat16 and error(made) < 1.2 * error(whole)


@torch.no_grad()
def test_a_picture_whose_parts_differ_keeps_its_colours(thin: None) -> None:
    """Where statistics were those of a strip, a flat sky above a busy ground would change its colour."""
    vae, z = autoencoder(), latents(16, 6)
    z[:, :, :8] *= 0.01
    assert levels_apart(torch.cat(list(decode_strips(vae, z)), 2), vae.decode(z).sample) < 0.01


@torch.no_grad()
def test_a_picture_that_is_small_is_decoded_bit_for_bit_as_the_whole() -> None:
    vae = autoencoder()
    (made,) = decode_strips(vae, latents())
    assert torch.equal(made, vae.decode(latents()).sample)


@torch.no_grad()
def test_feature_maps_over_the_budget_are_not_held_in_memory(thin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    real = strips._Map.append

    def append(self: Any, strip: torch.Tensor) -> None:
        real(self, strip)
        kept.append(self._budget.held)

    monkeypatch.setattr(strips._Map, "append", append)
    list(decode_strips(autoencoder(), latents(), budget=30_000))
    assert 0 < max(kept) <= 30_000


@torch.no_grad()
def test_when_memory_runs_out_strips_become_thinner_and_finished_rows_are_kept(
    thin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, sizes = autoencoder(), []
    whole = vae.decode(latents()).sample
    real = vae.decoder.conv_out.forward
    monkeypatch.setitem(strips._STRIP_BYTES, "cpu", 4000)

    def scarce(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[2])
        if rows.shape[2] > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(rows)

    monkeypatch.setattr(vae.decoder.conv_out, "forward", scarce)
    made = list(decode_strips(vae, latents()))
    assert levels_apart(torch.cat(made, 2), whole) < 0.01
    failed = [size for size in sizes if size > 4]
    assert failed == sorted(set(failed), reverse=True) and failed  # no size fails twice


@torch.no_grad()
def test_memory_that_does_not_suffice_for_a_row_is_one_sentence(thin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = autoencoder()

    def none(rows: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(vae.decoder.conv_out, "forward", none)
    with pytest.raises(OutOfMemory, match="even for one row"):
        list(decode_strips(vae, latents()))


def test_a_temporary_folder_that_is_full_is_said(thin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(DiptychError, match="temporary folder .* is too small .* TMPDIR"):
        list(decode_strips(autoencoder(), latents(), budget=0))


def test_cancelling_stops_within_one_strip(thin: None) -> None:
    cancel = threading.Event()
    made = decode_strips(autoencoder(), latents(), cancel=cancel)
    next(made)
    cancel.set()
    with pytest.raises(Cancelled):
        next(made)


def test_other_autoencoders_are_not_taken_for_those_of_stable_diffusion() -> None:
    from diffusers import AutoencoderTiny

    assert runs_in_strips(autoencoder()) and not runs_in_strips(AutoencoderTiny())
