"""What a masked part begins from, and latents that are enlarged without decoding them."""

import pytest
import torch
from PIL import Image, ImageChops
from torch.nn import functional

from diptych.pipelines.generation import GenerationRequest, generate
from diptych.pipelines.latents import LATENT_MODES, enlarge_latents, latent_mode
from diptych.pipelines.loading import load_pipeline
from diptych.pipelines.masked import MASKED_CONTENT, emptied, fill


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder):
    return load_pipeline(str(tiny_pipeline_folder), dtype="fp32")


def drawn(pipeline, content, **more):
    init, mask = Image.effect_noise((64, 64), 90).convert("RGB"), Image.new("L", (64, 64))
    init.paste((200, 30, 60), (0, 0, 64, 32))
    mask.paste(255, (0, 0, 32, 64))
    wish = {"steps": 6, "seed": 3, "strength": 0.3, "upscale": 1, "init_image": init, "mask": mask} | more
    (made,) = generate(pipeline, GenerationRequest("a red cat", masked_content=content, **wish))
    return made


def test_each_content_begins_elsewhere_and_none_touches_what_is_kept(pipeline):
    made = {content: drawn(pipeline, content) for content in MASKED_CONTENT}
    assert len({one.image.tobytes() for one in made.values()}) == 4
    kept = [one.image.crop((32, 0, 64, 32)) for one in made.values()]
    assert all(ImageChops.difference(one, kept[0]).getbbox() is None for one in kept)
    assert "Masked content" not in made["original"].infotext
    assert "Masked content: latent nothing" in made["latent nothing"].infotext


def test_a_seed_is_the_same_picture_with_latent_noise_alone_and_in_a_batch(pipeline):
    alone = drawn(pipeline, "latent noise", seed=4, init_image=RED, mask=WHITE)
    wish = GenerationRequest("a red cat", steps=6, seed=3, count=2, batch_size=2, strength=0.3, upscale=1,
                             init_image=RED, mask=WHITE, masked_content="latent noise")  # fmt: skip
    second = list(generate(pipeline, wish))[1]
    worst = max(high for _, high in ImageChops.difference(alone.image, second.image).getextrema())
    assert worst <= 1


RED, WHITE = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)


@pytest.mark.parametrize("sides", [(64, 64), (7, 50), (1, 1), (33, 2)])
def test_filling_takes_the_colours_around_and_leaves_the_rest(sides):
    torch.manual_seed(0)
    picture, mask = torch.rand(2, 3, *sides), (torch.rand(1, 1, *sides) > 0.6).float()
    mask[..., 0, 0] = 0
    filled = fill(picture, mask)
    keep = (mask == 0).expand_as(picture)
    assert torch.equal(filled[keep], picture[keep])
    inside = filled[~keep].view(-1)
    assert inside.numel() == 0 or (picture.min() <= inside.min() and inside.max() <= picture.max())


def test_a_hole_in_one_colour_is_filled_with_that_colour_and_a_hole_without_border_with_grey():
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 5:35, 9:30] = 1
    colour = torch.tensor([0.2, 0.9, 0.4]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
    assert torch.allclose(fill(colour * (1 - mask), mask), colour, atol=1e-6)
    assert (fill(colour, torch.ones(1, 1, 40, 40)) == 0.5).all()


@pytest.mark.parametrize("content, mean, spread", [("latent nothing", 0, 0), ("latent noise", 0, 1)])
def test_latents_are_emptied_within_the_mask_alone(content, mean, spread):
    latents, mask = torch.full((1, 4, 32, 32), 5.0), torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    started = emptied(latents, [torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)], content, mask)
    assert (started[..., 16:] == 5).all()
    inside = started[..., :16]
    assert abs(inside.mean() - mean) < 0.1 and abs(inside.std() - spread) < 0.1
    if content == "latent noise":
        assert started.shape[0] == 2 and not torch.equal(started[0], started[1])


def test_a_content_or_a_mode_that_does_not_exist_is_refused_with_the_list():
    with pytest.raises(ValueError, match="latent nothing"):
        GenerationRequest("a cat", masked_content="magic")
    with pytest.raises(ValueError, match="bicubic antialiased"):
        enlarge_latents(torch.zeros(1, 4, 2, 2), (4, 4), "Magic")


@pytest.mark.parametrize("mode", LATENT_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_enlarged_as_torch_does_in_that_mode(mode, dtype):
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    larger = enlarge_latents(latents, (9, 20), mode)
    assert larger.shape == (2, 4, 20, 9) and larger.dtype is dtype
    kind, antialias = LATENT_MODES[mode]
    assert torch.equal(
        larger, functional.interpolate(latents.float(), (20, 9), mode=kind, antialias=antialias).to(dtype)
    )


@pytest.mark.parametrize("given, found", [("latent (Nearest)", "Latent (nearest)"), ("Lanczos", None), (None, None)])
def test_a_mode_goes_by_its_name_in_any_case(given, found):
    assert latent_mode(given) == found
