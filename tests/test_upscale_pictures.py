"""`Upscaler.upscale`: any kind of picture in, the same kind out, nothing lost on the way."""

import functools
import os
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diptych.errors import CheckpointError, ImageError, ModelNotFound, UnknownArchitecture
from diptych.upscalers import Upscaler
from diptych.upscalers.networks import SRVGGNetCompact, load_network


@pytest.fixture(scope="module")
def repeating(make_srvgg):
    """Repeats every pixel 4 x 4 times, in fp32: whatever else happens to a picture shows."""
    return Upscaler(make_srvgg(gain=0), device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def lively(make_srvgg):
    """Changes pixels, in dependence of their neighbours."""
    return Upscaler(make_srvgg(), device="cpu", dtype="fp32")


def colours(height=9, width=7, channels=3, largest=255):
    return np.random.default_rng(0).integers(0, largest + 1, (height, width, channels))


def repeated(array, times=4):
    return array.repeat(times, 0).repeat(times, 1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "F", "I"])
def test_an_image_comes_back_in_its_mode_with_its_pixels(repeating, mode):
    if mode in ("I;16", "I", "F"):
        array = colours(channels=1, largest=65535)[..., 0]
        image = Image.fromarray((array / 65535).astype(np.float32) if mode == "F" else array.astype(np.uint16))
        image = image.convert("I") if mode == "I" else image
    else:
        image = Image.fromarray(colours(channels=4).astype(np.uint8)).convert(mode)
        image.putalpha(255) if mode in ("LA", "RGBA") else None
    out = repeating.upscale(image)
    assert (out.mode, out.size) == (mode, (28, 36))
    assert np.abs(np.asarray(out, np.float64) - repeated(np.asarray(image, np.float64))).max() <= 1e-6


@pytest.mark.parametrize(
    ("mode", "result"), [("1", "L"), ("P", "RGB"), ("YCbCr", "RGB"), ("HSV", "RGB"), ("RGBX", "RGB")]
)
def test_modes_without_shades_of_their_own_become_plain_ones(repeating, mode, result):
    image = Image.fromarray(colours().astype(np.uint8)).convert(mode)
    out = repeating.upscale(image)
    assert out.mode == result
    assert np.array_equal(np.asarray(out), repeated(np.asarray(image.convert(result))))


def test_a_transparent_palette_colour_becomes_alpha(repeating):
    image = Image.new("P", (6, 4))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    image.info["transparency"] = 1
    out = np.asarray(repeating.upscale(image))
    assert out.shape == (16, 24, 4)
    assert (out[:3, :3, 3] == 0).all() and (out[8:, 8:] == [255, 0, 0, 255]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3), (9, 7, 4), (2, 9, 7, 3)], ids=str)
def test_an_array_keeps_its_dtype_and_its_axes(repeating, dtype, shape):
    largest = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    array = (np.random.default_rng(0).random(shape) * largest).astype(dtype)
    if shape[-1] == 4:
        array[..., 3] = largest
    out = repeating.upscale(array)
    rows = 1 if len(shape) == 4 else 0
    expected = array.repeat(4, rows).repeat(4, rows + 1)
    assert out.dtype == dtype and out.shape == expected.shape
    assert np.abs(out.astype(np.float64) - expected).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 9, 7), (4, 9, 7), (2, 3, 9, 7)], ids=str)
def test_a_tensor_keeps_its_dtype_and_its_axes(lively, dtype, shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tensor = (values * 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)
    out = lively.upscale(tensor, 3)
    assert out.dtype == dtype and out.shape == (*shape[:-2], 27, 21)
    assert not out.is_inference() and not out.requires_grad


def test_tensor_array_and_image_of_the_same_picture_give_the_same(lively):
    array = colours(20, 30).astype(np.uint8)
    from_image = np.asarray(lively.upscale(Image.fromarray(array), 2.5))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert np.array_equal(from_image, lively.upscale(array, 2.5))
    assert np.array_equal(from_image, lively.upscale(tensor, 2.5).permute(1, 2, 0).numpy())


def test_a_list_gives_a_list_of_each_alone_and_its_progress_is_one(lively):
    pictures = [colours(9, 7).astype(np.uint8), Image.new("L", (5, 6), 77), torch.rand(3, 8, 8)]
    seen = []
    together = lively.upscale(pictures, progress=lambda *now: seen.append(now))
    assert [type(one) for one in together] == [np.ndarray, Image.Image, torch.Tensor]
    assert np.array_equal(together[0], lively.upscale(pictures[0]))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_grey_stays_grey_and_equals_the_mean_of_its_colours(lively):
    grey = colours(20, 30, 1).astype(np.uint8)
    colour = lively.upscale(np.repeat(grey, 3, 2).astype(np.float32) / 255)
    assert np.abs(lively.upscale(grey.astype(np.float32) / 255)[..., 0] - colour.mean(2)).max() <= 1e-6


def test_a_grey_network_enlarges_each_channel_on_its_own(make_srvgg):
    upscaler = Upscaler(make_srvgg(num_in_ch=1), dtype="fp32")
    array = colours(12, 10).astype(np.uint8)
    out = upscaler.upscale(array)
    for channel in range(3):
        assert np.array_equal(out[..., channel], upscaler.upscale(array[..., channel]))


@pytest.mark.parametrize("scale", [4, 3, 1, 10])
def test_what_cannot_be_seen_leaves_no_fringe_around_what_can(lively, scale):
    array = np.zeros((40, 40, 4), np.uint8)  # black, as most programs leave what is transparent
    array[12:28, 12:28] = (200, 120, 40, 255)
    plain = np.empty((40, 40, 3), np.uint8)
    plain[:] = (200, 120, 40)
    out, expected = lively.upscale(array, scale), lively.upscale(plain, scale)
    seen = out[..., 3] > 0
    assert np.abs(out[..., :3].astype(int) - expected)[seen].max() <= 1
    inner, outer = slice(int(17 * scale), int(23 * scale)), int(8 * scale)
    assert (out[inner, inner, 3] == 255).all() and (out[:outer, :, 3] == 0).all()


def test_an_opaque_alpha_changes_nothing_and_stays_opaque(lively):
    array = colours(20, 30, 4).astype(np.uint8)
    array[..., 3] = 255
    out = lively.upscale(array, tile=16)
    assert (out[..., 3] == 255).all()
    assert np.array_equal(out[..., :3], lively.upscale(array[..., :3], tile=16))


def test_tiles_are_exact_with_alpha_too(lively):
    array = colours(70, 50, 4).astype(np.float32) / 255
    array[20:50, 10:40, 3] = 0
    array[:15, :, 3] = 1
    assert np.abs(lively.upscale(array, tile=16) - lively.upscale(array)).max() <= 2e-6


def test_sixteen_bits_are_not_squeezed_through_eight(repeating):
    ramp = np.linspace(20000, 21000, 64 * 64).astype(np.uint16).reshape(64, 64)
    out = repeating.upscale(ramp, 3)
    assert len(np.unique(out)) > 900


def test_orientation_is_applied_once_and_the_callers_image_is_left_alone(repeating, tmp_path):
    array = colours(6, 9).astype(np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = orientation, "Maker"
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(array).save(path, exif=exif)
        with Image.open(path) as image:
            out = repeating.upscale(image)
            assert image.getexif()[0x0112] == orientation
        transposed = array.transpose(1, 0, 2)
        upright = {1: array, 2: array[:, ::-1], 3: np.rot90(array, 2), 4: array[::-1]}
        upright |= {5: transposed, 6: np.rot90(array, -1), 7: np.rot90(transposed, 2), 8: np.rot90(array, 1)}
        assert np.array_equal(np.asarray(out), repeated(upright[orientation]))
        exif.load(out.info["exif"])
        assert (exif[0x0112], exif[0x010F]) == (1, "Maker")


def cmyk_profile(lightness):
    """An ICC profile (version 2) in which cyan is a grey of this lightness, 0 to 255, and other inks are black."""
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])  # 4 inks in, Lab out, a grid of 2
    table += b"".join(struct.pack(">i", 65536 * (i in (0, 4, 8))) for i in range(9))
    table += bytes(range(256)) * 4
    table += b"".join(bytes([{0: 255, 8: lightness}.get(inks, 0), 128, 128]) for inks in range(16))
    table += bytes(range(256)) * 3
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 144 + len(table), b"\0" * 4, 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    head = head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table


@pytest.mark.parametrize(
    ("profile", "colour"),
    [
        (None, (0, 255, 255)),
        (cmyk_profile(128), (120, 120, 120)),
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), (0, 255, 255)),  # says nothing of CMYK
        (b"damaged", (0, 255, 255)),
    ],
)
def test_cmyk_becomes_srgb_by_its_profile_or_as_ink_on_white_paper(repeating, profile, colour):
    image = Image.new("CMYK", (5, 4), (255, 0, 0, 0))
    if profile:
        image.info["icc_profile"] = profile
    result = repeating.upscale(image)
    assert (result.mode, result.size) == ("RGB", (20, 16)) and "icc_profile" not in result.info
    assert np.abs(np.asarray(result).astype(int) - colour).max() <= 5


def test_cmyk_files_are_enlarged(repeating, tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "print.jpg", quality=100)
    repeating.upscale_file(tmp_path / "print.jpg", tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as large:
        assert large.mode == "RGB" and np.abs(np.asarray(large).astype(int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        (np.zeros((5, 6, 2), np.uint8), r"shape \(5, 6, 2\) has 2 channels: \(H, W, C\) with 1 .* works"),
        (np.zeros((5, 6, 5), np.uint8), "has 5 channels"),
        (torch.zeros(2, 5, 6), r"has 2 channels: \(C, H, W\)"),
        (np.zeros((0, 6, 3), np.uint8), "is empty: there is nothing to enlarge"),
        (torch.zeros(3, 5, 0), "is empty"),
        (torch.zeros(0, 3, 5, 5), "is empty"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels is empty"),
        (np.zeros(5, np.uint8), "is no picture"),
        (torch.zeros(5, 5), "is no picture"),
        (np.zeros((5, 5, 3), np.int64), "array of int64 is no picture: use uint8, uint16, or floats"),
        (np.zeros((5, 5, 3), bool), "array of bool is no picture"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), "tensor of torch.int64"),
        (np.full((5, 5, 3), np.nan), "holds NaN or infinity"),
        (torch.full((3, 5, 5), torch.inf), "holds NaN or infinity"),
        (np.full((5, 5, 3), 200.0), "must lie in 0..1, this one lies in 200..200: divide it first"),
        (torch.full((3, 5, 5), -1.0), "must lie in 0..1"),
        (Image.new("LAB", (5, 5)), "mode LAB cannot be enlarged: convert it to RGB first"),
        (Image.new("I", (5, 5), 70000), "must lie in 0..65535"),
        (Image.new("F", (5, 5), 200), "must lie in 0..1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_picture_is_refused_with_a_sentence(repeating, picture, sentence):
    with pytest.raises(ImageError, match=sentence):
        repeating.upscale(picture)


def test_what_is_no_kind_of_picture_is_a_wrong_argument(repeating):
    with pytest.raises(ValueError, match="a picture is a PIL image, .* not a str"):
        repeating.upscale("photo.jpg")


def test_bf16_is_chosen_only_where_it_gives_forty_decibels(make_srvgg, monkeypatch):
    monkeypatch.setattr("diptych.upscalers.device._cpu_has_bf16", lambda: True)
    monkeypatch.setattr("diptych.upscalers.device._onednn_may_use_bf16", lambda: True)
    network = make_srvgg()
    assert Upscaler(network, device="cpu").dtype is torch.bfloat16
    with torch.no_grad():  # large values that cancel out: 8 bits of mantissa do not do
        network.module.body[-1].weight *= 3000
        network.module.body[-1].weight[24:] = -network.module.body[-1].weight[:24]
    assert Upscaler(network, device="cpu").dtype is torch.float32
    assert Upscaler(network, device="cpu", dtype="bf16").dtype is torch.bfloat16


def test_a_precision_in_which_the_network_gives_nan_is_not_chosen(make_srvgg, monkeypatch):
    monkeypatch.setattr("diptych.upscalers.runner.pick_dtype", lambda dtype, device: torch.bfloat16)
    network = make_srvgg()
    network.module.register_forward_hook(lambda module, x, out: out * (torch.nan if out.dtype != torch.float32 else 1))
    assert Upscaler(network, device="cpu").dtype is torch.float32


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX")
def test_saved_files_are_readable_for_whom_new_files_are(lively, tmp_path, umask):
    before = os.umask(umask)
    try:
        lively.save_pretrained(tmp_path / "network")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "network").iterdir()} == {0o666 & ~umask}


def test_a_compiled_network_gives_the_same_and_says_so_where_it_cannot_be_compiled(make_srvgg, monkeypatch):
    # Without the C++ compiler, which takes half a minute: everything up to it is as always.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    network, picture = make_srvgg(num_conv=0), torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = Upscaler(network, device="cpu", dtype="fp32").upscale(picture)
    compiled = Upscaler(network, device="cpu", dtype="fp32", compile=True).upscale(picture, tile=16)
    assert (compiled - expected).abs().max() <= 1e-6
    torch._dynamo.reset()
    network.module.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="torch.compile does not work here, so leave compile out: "):
        Upscaler(network, device="cpu", dtype="fp32", compile=True)


def test_what_is_saved_is_loaded_again_and_gives_the_same(lively, tmp_path):
    lively.save_pretrained(tmp_path / "new" / "upscaler")
    array = colours(20, 30).astype(np.uint8)
    for place in ("new/upscaler", "new", "new/upscaler/diffusion_pytorch_model.safetensors"):
        loaded = Upscaler.from_pretrained(tmp_path / place, device="cpu", dtype="fp32")
        assert loaded.scale == 4 and np.array_equal(loaded.upscale(array), lively.upscale(array))


def test_a_folder_that_holds_no_upscaler_says_what_belongs_there(lively, tmp_path):
    with pytest.raises(ModelNotFound, match="holds no upscaler: config.json and diffusion_pytorch_model.safetensors"):
        Upscaler.from_pretrained(tmp_path)
    lively.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is no JSON"):
        Upscaler.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "SRVGGNetCompact", "num_conv": 7}')
    with pytest.raises((CheckpointError, UnknownArchitecture)):
        Upscaler.from_pretrained(tmp_path)


def test_a_network_between_different_channels_is_refused():
    network = load_network(SRVGGNetCompact(1, 3, 8, 1, 2).state_dict())
    with pytest.raises(UnknownArchitecture, match="makes 3 channels of 1: only networks from grey to grey"):
        Upscaler(network)


def test_denoise_is_refused_for_networks_without_a_twin(lively, tmp_path):
    lively.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not apply to a folder"):
        Upscaler.from_pretrained(tmp_path, denoise=0.5)
    with pytest.raises(ValueError, match="denoise works with general-x4v3, not with"):
        Upscaler.from_pretrained(tmp_path / "diffusion_pytorch_model.safetensors", denoise=0.5)


def test_denoise_lies_between_the_two_networks(make_srvgg, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    general, wdn = make_srvgg(num_conv=2), make_srvgg(num_conv=2, gain=2)
    for network, name in ((general, "realesr-general-x4v3"), (wdn, "realesr-general-wdn-x4v3")):
        torch.save({"params": dict(network.module.state_dict())}, tmp_path / f"{name}.pth")
    save_file({}, tmp_path / "unrelated.safetensors")
    array = colours(12, 10).astype(np.uint8)
    path = tmp_path / "realesr-general-x4v3.pth"
    ends = [Upscaler.from_pretrained(path, dtype="fp32", denoise=x).upscale(array) for x in (1, 0)]
    assert np.array_equal(ends[0], Upscaler(general, dtype="fp32").upscale(array))
    assert np.array_equal(ends[1], Upscaler(wdn, dtype="fp32").upscale(array))
