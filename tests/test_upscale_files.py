"""`Upscaler.upscale_file`: formats, what a picture says about itself, animations, and files that are no pictures."""

import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, features

from diptych.errors import Cancelled, DiptychError, ImageError
from diptych.upscalers import Upscaler, picture_reader

png = pytest.importorskip("png")
tifffile = pytest.importorskip("tifffile")


@pytest.fixture(scope="module")
def repeating(make_srvgg):
    """Repeats every pixel 4 x 4 times, in fp32."""
    return Upscaler(make_srvgg(gain=0), device="cpu", dtype="fp32")


def colours(height=9, width=7, channels=3, dtype=np.uint8):
    largest = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, largest, (height, width, channels), endpoint=True).astype(dtype)


def repeated(array, times=4):
    return array.repeat(times, 0).repeat(times, 1)


def write_png(path, array, **options):
    height, width, channels = array.shape
    bits = array.dtype.itemsize * 8
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=bits, **options)
    with path.open("wb") as file:
        writer.write(file, array.reshape(height, -1))


def read_png(path):
    """By a library that is not the one under test."""
    with path.open("rb") as file:
        width, height, rows, info = png.Reader(file=file).read()
        return np.stack([np.array(row) for row in rows]).reshape(height, width, info["planes"])


LOSSLESS = ["png", "tif", "bmp"]


@pytest.mark.parametrize("result", [*LOSSLESS, "webp", "jpg", "gif", "avif"])
@pytest.mark.parametrize("source", [*LOSSLESS, "webp"])
def test_every_format_is_read_and_written(repeating, tmp_path, source, result):
    if result == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    x, y = np.meshgrid(np.arange(24), np.arange(16))
    array = np.stack([x * 10, y * 15, x * 5 + y * 5], 2).astype(np.uint8)
    src, dst = tmp_path / f"in.{source}", tmp_path / f"out.{result}"
    Image.fromarray(array).save(src, lossless=True)
    assert repeating.upscale_file(src, dst) == (96, 64)
    with Image.open(dst) as image:
        out = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(out - repeated(array)).mean() <= (0 if result in LOSSLESS else 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({src.name, dst.name})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("source", ["png", "tif"])
@pytest.mark.parametrize("result", ["png", "tif"])
def test_every_depth_and_channel_count_survives(repeating, tmp_path, source, result, channels, dtype):
    array = colours(channels=channels, dtype=dtype)
    if channels in (2, 4):
        array[..., -1] = np.iinfo(dtype).max
    src, dst = tmp_path / f"in.{source}", tmp_path / f"out.{result}"
    if source == "png":
        write_png(src, array)
    else:
        extra = ["unassalpha"] if channels in (2, 4) else None
        planes = array if channels > 1 else array[..., 0]
        photometric = "rgb" if channels > 2 else "minisblack"
        tifffile.imwrite(
            src, planes, photometric=photometric, extrasamples=extra, planarconfig="contig" if extra else None
        )
    repeating.upscale_file(src, dst)
    out = read_png(dst) if result == "png" else tifffile.imread(dst).reshape(36, 28, channels)
    assert out.dtype.itemsize == np.dtype(dtype).itemsize and np.array_equal(out, repeated(array))


def test_a_tiff_of_floats_is_written_with_sixteen_bits(repeating, tmp_path):
    array = np.random.default_rng(0).random((9, 7, 3), dtype=np.float32)
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb")
    repeating.upscale_file(tmp_path / "in.tif", tmp_path / "out.tif")
    out = tifffile.imread(tmp_path / "out.tif")
    assert out.dtype == np.uint16 and np.abs(out / 65535 - repeated(array)).max() <= 1 / 65535


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", ["png", "tif", "tiled.tif"])
def test_what_is_too_large_to_decode_whole_is_read_by_rows_with_the_same_result(
    repeating, tmp_path, monkeypatch, kind, dtype, channels
):
    array = colours(75, 50, channels, dtype)
    src = tmp_path / f"in.{kind}"
    if kind == "png":
        write_png(src, array)
    else:
        tile = {"tile": (16, 16)} if kind == "tiled.tif" else {"rowsperstrip": 10}
        extra = ["unassalpha"] if channels in (2, 4) else None
        photometric = "rgb" if channels > 2 else "minisblack"
        planes = array if channels > 1 else array[..., 0]
        config = "contig" if channels > 1 else None
        tifffile.imwrite(src, planes, photometric=photometric, extrasamples=extra, planarconfig=config, **tile)
    repeating.upscale_file(src, tmp_path / "whole.png", 3, tile=16)
    monkeypatch.setattr(picture_reader, "_WHOLE", 0)
    monkeypatch.setattr(picture_reader, "_STRIP_BYTES", 2000)
    with picture_reader.open_picture(src) as picture:
        assert type(picture.source).__name__ == "StripSource"
    repeating.upscale_file(src, tmp_path / "rows.png", 3, tile=16)
    assert np.array_equal(read_png(tmp_path / "rows.png"), read_png(tmp_path / "whole.png"))


def test_a_palette_of_few_bits_is_read_by_rows_too(repeating, tmp_path, monkeypatch):
    image = Image.fromarray(colours()).quantize(4)
    image.save(tmp_path / "in.png", bits=2)
    monkeypatch.setattr(picture_reader, "_WHOLE", 0)
    repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as out:
        assert np.array_equal(np.asarray(out), repeated(np.asarray(image.convert("RGB"))))


def described(path, kind, orientation=6):
    """Writes a picture that says much about itself, and gives back its colour profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = orientation, "Maker", {0x9003: "2020:01:01 00:00:00"}
    options = {"dpi": (300, 300)} if kind in ("png", "jpg", "tif") else {}
    if kind == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("parameters", "a red apple\nSteps: 20")
        options["pnginfo"].add_itxt("Title", "りんご")
    Image.fromarray(colours()).save(path, exif=exif.tobytes(), icc_profile=profile, **options)
    return profile


@pytest.mark.parametrize("result", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("source", ["png", "jpg", "webp", "tif"])
def test_metadata_survives_and_the_orientation_is_applied_once(repeating, tmp_path, source, result):
    src, dst = tmp_path / f"in.{source}", tmp_path / f"out.{result}"
    profile = described(src, source)
    repeating.upscale_file(src, dst)
    with Image.open(dst) as image:
        image.load()
        exif = image.getexif()
        assert image.size == (36, 28)  # 9 x 7, stored lying on its side
        assert exif.get(0x0112, 1) == 1 and exif[0x010F] == "Maker"
        assert exif.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
        assert image.info["icc_profile"] == profile
        if source != "webp" and result != "webp":
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        if source == result == "png":
            assert image.text == {"parameters": "a red apple\nSteps: 20", "Title": "りんご"}


def test_a_damaged_exif_block_does_not_spoil_the_picture(repeating, tmp_path):
    Image.fromarray(colours()).save(tmp_path / "in.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense")
    assert repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.png") == (28, 36)


@pytest.mark.parametrize("result", ["gif", "webp", "png"])
@pytest.mark.parametrize("source", ["gif", "webp", "png"])
def test_an_animation_keeps_its_frames_durations_and_repetitions(repeating, tmp_path, source, result):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    for number, frame in enumerate(frames):
        frame.paste("white", (number * 3, 0, number * 3 + 3, 10))
    src, dst = tmp_path / f"in.{source}", tmp_path / f"out.{result}"
    frames[0].save(src, save_all=True, append_images=frames[1:], duration=[50, 70, 90], loop=3, lossless=True)
    seen = []
    assert repeating.upscale_file(src, dst, progress=lambda *now: seen.append(now)) == (48, 40)
    assert seen[-1][0] == seen[-1][1]
    with Image.open(dst) as image:
        assert image.n_frames == 3 and image.info["loop"] == 3
        for number, (frame, duration) in enumerate(zip(frames, (50, 70, 90), strict=True)):
            image.seek(number)
            image.load()
            assert image.info["duration"] == duration
            expected = repeated(np.asarray(frame, int))
            assert np.abs(np.asarray(image.convert("RGB"), int) - expected).mean() <= (8 if result == "webp" else 0)


def test_an_animation_is_not_silently_cut_to_its_first_frame(repeating, tmp_path):
    Image.new("RGB", (9, 9), "red").save(
        tmp_path / "in.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")]
    )
    with pytest.raises(
        ImageError, match="out.jpg cannot be written: JPEG holds no animation; take .gif, .webp or .png"
    ):
        repeating.upscale_file(tmp_path / "in.gif", tmp_path / "out.jpg")


def test_transparency_is_not_silently_dropped(repeating, tmp_path):
    Image.new("RGBA", (9, 9), (255, 0, 0, 100)).save(tmp_path / "in.png")
    with pytest.raises(ImageError, match="JPEG holds no transparency, and the picture has some"):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.jpg")
    Image.new("RGBA", (9, 9), (255, 0, 0, 255)).save(tmp_path / "in.png")
    assert repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.jpg") == (36, 36)


def bomb(path, width, height):
    """A PNG that claims to have many pixels, in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(repeating, tmp_path):
    bomb(tmp_path / "in.png", 60000, 60000)
    with pytest.raises(ImageError, match="in.png: it claims to have 60000 x 60000 pixels, and more than 536 million"):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.png")


def test_a_large_picture_is_no_bomb_and_pillows_own_limit_stays_as_it_is(tmp_path):
    bomb(tmp_path / "in.png", 24000, 16000)
    limit = Image.MAX_IMAGE_PIXELS
    with picture_reader.open_picture(tmp_path / "in.png") as picture:
        assert (picture.width, picture.height) == (24000, 16000)
        with pytest.raises(ImageError, match="in.png: the picture is damaged or cut off"):
            picture.source.rows(0, 1)
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "in.png: the file is empty"),
        (b"just some text", "in.png: it is not a picture, or of a format that Pillow does not know"),
        (b"<html>404 Not Found</html>", "it is not a picture"),
        (b"\x89PNG\r\n\x1a\n", "in.png: "),
        (b"II*\0\x08\0\0\0\0\0", "in.png: "),
    ],
    ids=["empty", "text", "html", "only a signature", "TIFF without tags"],
)
def test_a_file_that_is_no_picture_is_named_and_nothing_is_written(repeating, tmp_path, content, sentence):
    (tmp_path / "in.png").write_bytes(content)
    with pytest.raises(ImageError, match=sentence):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "gif"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_a_truncated_picture_is_an_error_not_a_grey_area(repeating, tmp_path, monkeypatch, kind, by_rows):
    if by_rows:
        monkeypatch.setattr(picture_reader, "_WHOLE", 0)
    src = tmp_path / f"in.{kind}"
    Image.fromarray(colours(200, 200)).save(src)
    src.write_bytes(src.read_bytes()[: src.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"in.{kind}: "):
        repeating.upscale_file(src, tmp_path / "out.png", 1, tile=64)
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


def test_the_picture_itself_is_never_the_result(repeating, tmp_path):
    src = tmp_path / "in.png"
    Image.fromarray(colours()).save(src)
    before = src.read_bytes()
    os.link(src, tmp_path / "same.png")
    for dst in (src, tmp_path / "." / "in.png", tmp_path / "same.png"):
        with pytest.raises(ImageError, match="is the picture itself: choose another name for the result"):
            repeating.upscale_file(src, dst)
    assert src.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("out.xyz", "out.xyz cannot be written: the name of a picture ends in one of .png, .tif"),
        ("out", "cannot be written: the name of a picture ends in"),
        ("missing/out.png", "out.png cannot be written: No such file or directory"),
        ("in.png/out.png", "out.png cannot be written: Not a directory"),
    ],
)
def test_a_result_that_cannot_be_written_is_named(repeating, tmp_path, name, sentence):
    Image.fromarray(colours()).save(tmp_path / "in.png")
    with pytest.raises(ImageError, match=sentence):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "width", "sentence"),
    [
        ("out.webp", 5000, "WEBP holds at most 16383 pixels along a side, and this would be 20000 x 4; take .png or"),
        ("out.jpg", 16376, "JPEG holds at most 65500 pixels along a side, and this would be 65504 x 4; take .png or"),
        ("out.gif", 16384, "GIF holds at most 65535 pixels"),
    ],
)
def test_a_result_too_large_for_its_format_is_refused_before_any_work(repeating, tmp_path, name, width, sentence):
    Image.new("L", (width, 1)).save(tmp_path / "in.png")
    started = []
    with pytest.raises(ImageError, match=sentence):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / name, progress=lambda done, total: started.append(done))
    assert started == []


def test_a_picture_that_is_not_there_or_a_folder_is_an_error_of_the_file_system(repeating, tmp_path):
    with pytest.raises(FileNotFoundError):
        repeating.upscale_file(tmp_path / "none.png", tmp_path / "out.png")
    with pytest.raises(OSError, match="directory"):
        repeating.upscale_file(tmp_path, tmp_path / "out.png")


@pytest.mark.parametrize("name", ["out.png", "out.tif", "out.jpg"])
def test_cancelling_leaves_the_old_file_and_no_new_one(repeating, tmp_path, name):
    Image.fromarray(colours(80, 80)).save(tmp_path / "in.png")
    (tmp_path / name).write_bytes(b"what was here before")
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        repeating.upscale_file(
            tmp_path / "in.png", tmp_path / name, tile=16, cancel=cancel, progress=lambda done, total: cancel.set()
        )
    assert (tmp_path / name).read_bytes() == b"what was here before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("source", "result", "needed"),  # megabytes of 400 x 400 pixels: channels, bytes of each, frames
    [("L.png", "out.png", 0.16), ("RGB.png", "out.jpg", 0.48), ("RGBA.tif", "out.tif", 0.64)]
    + [("I;16.png", "out.tif", 0.32), ("I;16.png", "out.webp", 0.16), ("animated.gif", "out.webp", 1.92)],
)
def test_a_picture_too_large_for_its_disk_is_said_before_the_work(
    repeating, tmp_path, monkeypatch, source, result, needed
):
    mode = source.split(".")[0]
    if mode == "animated":
        frames = [Image.fromarray(colours(100, 100)) for _ in range(3)]
        frames[1].putpixel((0, 0), (1, 2, 3))
        frames[2].putpixel((0, 0), (9, 9, 9))
        frames[0].save(tmp_path / source, save_all=True, append_images=frames[1:])
    else:
        Image.new(mode, (100, 100)).save(tmp_path / source)
    usage, started = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed * 0.99e6)))
    ask = (tmp_path / source, tmp_path / result)
    with pytest.raises(ImageError, match=rf"{result} may take {needed:.1f} MB, and its disk has .* free: make room"):
        repeating.upscale_file(*ask, progress=lambda done, total: started.append(done))
    assert started == [] and os.listdir(tmp_path) == [source]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(needed * 1.02e6)))
    assert repeating.upscale_file(*ask) == (400, 400)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_no_space_is_an_error_that_names_the_file_and_leaves_none(tmp_path):
    names = ["out.png", "out.tif", "out.bmp"]
    Image.fromarray(colours(200, 200)).save(tmp_path / "in.png")
    program = (
        "import resource, signal, sys\n"
        "from diptych.errors import ImageError\n"
        "from diptych.upscalers import Upscaler, SRVGGNetCompact, load_network\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "upscaler = Upscaler(load_network(SRVGGNetCompact(num_feat=4, num_conv=1).state_dict()), dtype='fp32')\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        upscaler.upscale_file('in.png', name, 2)\n"
        "    except ImageError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{name} cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error_that_names_the_file(repeating, tmp_path):
    Image.fromarray(colours()).save(tmp_path / "in.png")
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(ImageError, match="out.png cannot be written: Permission denied"):
        repeating.upscale_file(tmp_path / "in.png", tmp_path / "out" / "out.png")


KINDS = {"png": {}, "jpg": {}, "webp": {}, "gif": {}, "tif": {"compression": "tiff_lzw"}, "bmp": {}}


@pytest.mark.parametrize("kind", [*KINDS, "16.png", "16.tif", "animated.gif", "animated.webp"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_whatever_happens_to_a_valid_file_only_our_own_errors_come_out(tmp_path, monkeypatch, kind, by_rows):
    """Two thousand files: bits turned, bytes replaced, parts cut out, doubled or swapped."""
    if by_rows and kind not in ("png", "tif", "16.png", "16.tif"):
        pytest.skip("is never read by rows")
    path = tmp_path / f"in.{kind}"
    if kind == "16.png":
        write_png(path, colours(dtype=np.uint16))
    elif kind == "16.tif":
        tifffile.imwrite(path, colours(dtype=np.uint16), photometric="rgb")
    elif kind.startswith("animated"):
        Image.fromarray(colours()).save(path, save_all=True, append_images=[Image.fromarray(colours()[::-1])])
    else:
        Image.fromarray(colours(16, 16)).save(
            path, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" if kind == "jpg" else b"", **KINDS[kind]
        )
    if by_rows:
        monkeypatch.setattr(picture_reader, "_WHOLE", 0)
    monkeypatch.setattr(picture_reader, "MAX_PIXELS", 1 << 20)
    valid, random = path.read_bytes(), np.random.default_rng(0)
    read = 0
    for _ in range(150):
        path.write_bytes(mutated(valid, random))
        try:
            with picture_reader.open_picture(path) as picture:
                if picture.source is None:
                    picture.durations()
                    list(picture.animation())
                else:
                    picture.source.rows(0, picture.height)
            read += 1
        except DiptychError as error:
            assert str(path) in str(error)
    assert read < 150


def mutated(valid, random):
    """Bytes with one to eight changes."""
    data = bytearray(valid)
    for _ in range(random.integers(1, 9)):
        if len(data) < 8:
            break
        at, to = sorted(random.integers(0, len(data), 2))
        change = random.integers(0, 6)
        if change == 0:
            data[at] ^= 1 << random.integers(0, 8)
        elif change == 1:
            data[at] = random.integers(0, 256)
        elif change == 2:
            data[at : at + 4] = random.integers(0, 2**32, dtype=np.uint32).tobytes()
        elif change == 3 and random.random() < 0.3:
            del data[at:to]
        elif change == 4:
            data[at:at] = data[at : min(to, at + 40)]
        else:
            data[at : at + 4] = b"\xff\xff\xff\xff" if random.random() < 0.5 else b"\0\0\0\0"
    return bytes(data)
