"""Drawing an enlarged picture anew: hires. fix, in tiles where the model cannot hold the size."""

import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.errors import Cancelled, ImageError
from diptych.infotext import parse_infotext
from diptych.pipelines import DiptychPipeline, DiptychXLPipeline
from diptych.pipelines.generation import GenerationRequest, generate, plan_sizes
from diptych.pipelines.loading import load_pipeline
from diptych.pipelines.recall import request_fields
from diptych.pipelines.refine import TiledUNet, in_tiles, steps_for


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(tiny_pipeline_folder, device="cpu", dtype="fp32")


def request(**more: Any) -> GenerationRequest:
    return GenerationRequest("a red apple", **{"steps": 4, "seed": 1, "upscale": 2, "refine": 0.5, **more})


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


# Tiles


class Pointwise:
    """A UNet that looks at one pixel alone: tiles of it, however blended, are the whole."""

    config = SimpleNamespace(sample_size=8)

    def __call__(self, sample: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
        assert max(sample.shape[2:]) <= 8
        return (sample * 2 + timestep,)


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (31, 5), (64, 40)])
@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_tiles_cover_everything_and_their_weights_add_up(size: tuple[int, int], overlap: int) -> None:
    sample = torch.randn(2, 4, *size)
    unet = TiledUNet(Pointwise(), (8, 8), (overlap, overlap), None)
    for timestep in range(9, 0, -1):  # the tiles are elsewhere at every step
        (made,) = unet(sample, float(timestep))
        assert torch.allclose(made, sample * 2 + timestep, atol=1e-4)


def test_tiles_inside_are_elsewhere_at_every_step_and_the_same_within_one() -> None:
    seen: list[list[torch.Tensor]] = []

    class Seeing(Pointwise):
        def __call__(self, sample: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
            seen[-1].append(sample[0, 0, 0])
            return super().__call__(sample, timestep)

    unet, sample = TiledUNet(Seeing(), (8, 8), (4, 4), None), torch.arange(16.0).expand(1, 4, 8, 16)
    for timestep in (900, 900, 600, 300, torch.tensor(1)):
        seen.append([])
        unet(sample, timestep)
    starts = [[int(tile[0]) for tile in tiles] for tiles in seen]
    assert starts[0] == starts[1] and len({tuple(places) for places in starts}) == 4
    for places in starts:
        assert len(places) == 3 and (places[0], places[-1]) == (0, 8)
        assert all(1 <= after - before <= 6 for before, after in zip(places, places[1:], strict=False))


def test_where_tiles_disagree_the_step_is_spread_over_their_overlap() -> None:
    class Disagreeing(Pointwise):
        def __call__(self, sample: torch.Tensor, timestep: Any, **_: Any) -> tuple[torch.Tensor]:
            self.told = getattr(self, "told", 0) + 1
            return (torch.full_like(sample, self.told),)

    (made,) = TiledUNet(Disagreeing(), (8, 8), (4, 4), None)(torch.zeros(1, 4, 8, 12), 0)
    steps = made[0, 0, 0].diff()
    assert made.min() == 1 and made.max() == 2 and steps.max() < 0.3


def test_a_size_that_the_model_holds_is_not_cut() -> None:
    pipeline = SimpleNamespace(unet=Pointwise())
    for size, cut in (((8, 12), False), ((16, 8), True)):
        with in_tiles(pipeline, size):
            assert isinstance(pipeline.unet, TiledUNet) is cut
        assert type(pipeline.unet) is Pointwise


def test_cancelling_is_heard_between_two_tiles() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        TiledUNet(Pointwise(), (8, 8), (2, 2), cancel)(torch.zeros(1, 4, 16, 16), 0)


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.29, 0.3, 0.7, 1.0])
def test_image_to_image_takes_the_steps_that_are_wanted(strength: float) -> None:
    for steps in (1, 3, 7, 29):
        assert int(steps_for(steps, strength) * strength) == steps


# Pictures


@pytest.mark.parametrize("xl", [False, True])
def test_a_call_with_refine_draws_what_the_gan_enlarged_anew(
    xl: bool, tiny_pipeline_folder: Path, tiny_xl_folder: Path
) -> None:
    cls, folder = (DiptychXLPipeline, tiny_xl_folder) if xl else (DiptychPipeline, tiny_pipeline_folder)
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "upscale": 2, "output_type": "pt", "seed": [1, 2]}
    plain = pipeline("a cat", **arguments).images
    refined = pipeline("a cat", refine=0.4, **arguments).images
    assert refined.shape == plain.shape == (2, 3, 128, 128) and not torch.allclose(refined, plain, atol=0.01)
    alone = pipeline("a cat", refine=0.4, **{**arguments, "seed": 2}).images
    assert (refined[1:] - alone).abs().max() <= 1 / 255
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"


def test_a_request_with_refine_is_the_call_with_refine(pipeline: Any) -> None:
    (picture,) = generate(pipeline, request())
    called = pipeline("a red apple", num_inference_steps=4, guidance_scale=7.0, seed=1, upscale=2, refine=0.5).images[0]
    assert np.abs(pixels(picture.image) - pixels(called)).max() <= 1


def test_a_refined_picture_is_drawn_again_from_its_infotext_and_automatic1111_understands_it(pipeline: Any) -> None:
    (picture,) = generate(pipeline, request(width=80, height=64, upscale=1.7))
    assert picture.image.size == (136, 109)
    told = {
        "Denoising strength": "0.5",
        "Hires upscale": "1.7",
        "Hires steps": "2",
        "Hires upscaler": "SRVGGNetCompact",
    }
    assert told.items() <= picture.settings.items()
    fields, notes = request_fields(parse_infotext(picture.infotext))
    (again,) = generate(pipeline, GenerationRequest(**fields))
    assert notes == [] and np.array_equal(pixels(again.image), pixels(picture.image))


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ("Hires upscale: 2, Hires upscaler: R-ESRGAN 4x+", {"upscale": 2.0, "refine": 0.4, "refine_steps": 20}),
        ("Hires upscale: 2, Hires steps: 9, Hires upscaler: Latent", {"refine_steps": 9, "latent_mode": "Latent"}),
        ("Hires resize: 0x96, Hires upscaler: None", {"upscale": 1.5, "refine": 0.4}),
    ],
)
def test_what_automatic1111_wrote_of_its_hires_fix_is_read(settings: str, fields: dict[str, Any]) -> None:
    text = f"a cat\nSteps: 20, Sampler: Euler, Seed: 1, Size: 64x64, Denoising strength: 0.4, RNG: CPU, {settings}"
    found, notes = request_fields(parse_infotext(text))
    assert fields.items() <= found.items() and "strength" not in found
    GenerationRequest(**found)
    assert any("was enlarged with" in note for note in notes) is ("Latent" not in settings)


def test_latents_can_be_enlarged_without_a_gan(pipeline: Any) -> None:
    plain = type(pipeline)(**{**pipeline.components, "upscaler": None}, requires_safety_checker=False)
    (picture,) = generate(plain, request(latent_mode="Latent (bicubic)"))
    assert picture.image.size == (128, 128) and picture.settings["Hires upscaler"] == "Latent (bicubic)"
    assert "latent_mode" in request_fields(parse_infotext(picture.infotext))[0]


def test_progress_counts_both_passes(pipeline: Any) -> None:
    told: list[tuple[int, int]] = []
    list(generate(pipeline, request(count=2), progress=lambda *at: told.append(at)))
    assert told == sorted(told) and told[-1] == (18, 18) and {total for _, total in told} == {18}


# Straight to a file


def test_a_picture_that_goes_to_its_file_is_the_one_that_stays_in_memory(pipeline: Any, tmp_path: Path) -> None:
    plain = request(refine=None, upscale=3.3)
    (kept,) = generate(pipeline, plain)
    (filed,) = generate(pipeline, plain, file_for=lambda seed: tmp_path / f"{seed}.png")
    assert filed.path == tmp_path / "1.png" and np.array_equal(pixels(filed.image), pixels(kept.image))
    with Image.open(filed.path) as image:
        assert image.info["parameters"] == filed.infotext and image.size == (211, 211)


def test_latents_are_decoded_to_a_file_as_the_call_draws_them(pipeline: Any, tmp_path: Path) -> None:
    arguments = {"num_inference_steps": 2, "seed": 1}
    latents = pipeline("a cat", output_type="latent", **arguments).images
    for upscale in (1, 4):
        size = pipeline.decode_to_file(latents, tmp_path / "cat.png", upscale=upscale, parameters="a cat")
        with Image.open(tmp_path / "cat.png") as image:
            assert image.size == size == (64 * upscale, 64 * upscale) and image.info == {"parameters": "a cat"}
            drawn = pipeline("a cat", upscale=upscale, **arguments).images[0]
            assert np.abs(pixels(image) - pixels(drawn)).max() <= 1


def test_a_decode_to_a_file_that_overflows_is_repeated_in_fp32(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(3e5)
        pipeline.vae.decoder.conv_in.bias.mul_(3e5)
    pipeline.decode_to_file(latents, tmp_path / "fp32.png")
    pipeline.vae.half()
    pipeline.decode_to_file(latents, tmp_path / "fp16.png")
    assert pipeline.notes == ["the decode in float16 gave one picture black or NaN: decoded again in fp32"]
    assert np.abs(pixels(Image.open(tmp_path / "fp32.png")) - pixels(Image.open(tmp_path / "fp16.png"))).max() <= 5


def test_exact_strips_take_the_place_of_tiles(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diptych.pipelines import strips

    arguments = {"num_inference_steps": 1, "seed": 1, "output_type": "pt", "width": 128}
    whole = pipeline("a cat", **arguments).images
    monkeypatch.setattr(strips, "_WHOLE_BYTES", 0)
    monkeypatch.setitem(strips._STRIP_BYTES, "cpu", 20_000)
    pipeline.vae.enable_tiling()
    try:
        assert (pipeline("a cat", **arguments).images - whole).abs().max() < 1e-4
    finally:
        pipeline.vae.disable_tiling()


# Bad input


@pytest.mark.parametrize("refine", [0, -0.1, 1.5, float("nan")])
def test_a_refine_outside_of_its_range_is_refused(pipeline: Any, refine: float) -> None:
    for ask in (lambda: request(refine=refine), lambda: pipeline("a cat", upscale=2, refine=refine)):
        with pytest.raises(ValueError, match="refine is .* more than 0 and at most 1"):
            ask()


def test_refine_of_a_picture_that_is_not_enlarged_is_refused(pipeline: Any) -> None:
    with pytest.raises(ValueError, match="nothing is enlarged"):
        plan_sizes(pipeline, request(upscale=1, width=64, height=64))
    with pytest.raises(ValueError, match="say how many times with upscale"):
        pipeline("a cat", refine=0.3)


def test_refine_on_a_model_without_an_encoder_is_refused_before_anything_is_drawn(tiny_pipeline_folder: Path) -> None:
    pipeline = DiptychPipeline.from_pretrained(tiny_pipeline_folder)
    del pipeline.vae.encoder
    for ask in (lambda: next(generate(pipeline, request())), lambda: pipeline("a cat", upscale=2, refine=0.3)):
        with pytest.raises(ValueError, match="VAE of this model has no encoder"):
            ask()


def test_refine_with_a_mask_is_refused() -> None:
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="does not go with a mask"):
        request(init_image=image, mask=image.convert("L"))


def test_a_picture_too_large_for_its_disk_is_said_before_the_work(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    started: list[int] = []
    with pytest.raises(ImageError, match=r"1.png may take 0.2 MB, and its disk has 0.1 MB free"):
        list(
            generate(
                pipeline,
                request(refine=None, upscale=4),
                progress=lambda done, total: started.append(done),
                file_for=lambda seed: tmp_path / f"{seed}.png",
            )
        )
    with pytest.raises(ImageError, match="its disk has"):
        pipeline.decode_to_file(torch.zeros(1, 4, 16, 16), tmp_path / "x.png", upscale=4)
    assert started == [] and os.listdir(tmp_path) == []


def test_latents_of_several_pictures_do_not_go_to_one_file(pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latents of 2 pictures"):
        pipeline.decode_to_file(torch.zeros(2, 4, 16, 16), tmp_path / "x.png")
