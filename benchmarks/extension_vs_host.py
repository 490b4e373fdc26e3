"""The extension's way of upscaling against the hosts' own, on the same weights and picture, in one run.

    python benchmarks/extension_vs_host.py [--size 512] [--networks rrdb23 srvgg32] [--file WEIGHTS] [--repeats 3]

The hosts' way is written here from what they do: spandrel's network in fp32, tiles of 192 pixels that overlap by 8,
each rounded to 8 bits, joined by a linear ramp over the overlap. Without spandrel our own network of the same weights
stands in for it (same layers, contiguous, fp32), and the table says so. Ours is `Upscaler.upscale` as the extension
calls it.

Printed for each: seconds (median), PSNR against the whole picture in fp32 in one piece, and seams: the largest error on
the borders of the tiles and elsewhere. A ratio below 1 means that the extension is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from upscale_vs_peers import DEPTHS, random_weights

from diptych.upscalers import Network, Upscaler, load_network_file

TILE, OVERLAP = 192, 8  # the hosts' defaults


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--networks", nargs="+", default=["rrdb23", "srvgg32"], choices=DEPTHS, help="random weights")
    parser.add_argument("--file", type=Path, help="a file of weights instead of random ones")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.file:
        compare(load_network_file(args.file), args)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            random_weights(name, Path(folder, "weights.pth"))
            compare(load_network_file(Path(folder, "weights.pth")), args)


def compare(network: Network, args: argparse.Namespace) -> None:
    """Prints the table of one network."""
    picture = test_picture(args.size)
    hosts_module, hosts_name = hosts_network(network)
    with torch.inference_mode():
        reference = network.module(to_tensor(picture)).clamp(0, 1)

    upscaler = Upscaler(network, device="cpu")
    exact = Upscaler(network, device="cpu", dtype="fp32")
    ways: list[tuple[str, Callable[[], np.ndarray]]] = [
        (f"host: {hosts_name}, fp32, tiles {TILE}/{OVERLAP}", lambda: host_way(hosts_module, picture, network.scale)),
        (f"extension: {str(upscaler.dtype).removeprefix('torch.')} (auto)", lambda: upscaler.upscale(picture)),
        ("extension: fp32", lambda: exact.upscale(picture)),
        (f"extension: fp32, tiles of {TILE}", lambda: exact.upscale(picture, tile=TILE)),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    results: dict[str, np.ndarray] = {}
    for repeat in range(args.repeats + 1):  # the first round warms up; the ways take turns
        for name, way in ways:
            start = time.perf_counter()
            results[name] = way()
            if repeat:
                times[name].append(time.perf_counter() - start)

    threads = torch.get_num_threads()
    what = f"{network.architecture} x{network.scale}, {args.size}x{args.size}"
    print(f"\n{what}, {threads} threads, torch {torch.__version__}")
    print(f"{'':44} {'seconds':>8} {'ratio':>6} {'PSNR dB':>8} {'error at seams':>15} {'elsewhere':>10}")
    base = statistics.median(times[ways[0][0]])
    for name, _ in ways:
        seconds = statistics.median(times[name])
        error = np.abs(results[name].astype(np.float32) / 255 - to_array(reference))
        at, elsewhere = seams(error, args.size, network.scale)
        decibels = -10 * math.log10(float((error**2).mean()))
        print(
            f"{name:44} {seconds:8.2f} {seconds / base:6.2f} {decibels:8.1f} {at * 255:15.2f} {elsewhere * 255:10.2f}"
        )


def hosts_network(network: Network) -> tuple[nn.Module, str]:
    """The same weights as the hosts load them."""
    try:
        import spandrel
    except ImportError:
        return network.module, "our network in place of spandrel's"
    return spandrel.ModelLoader(device="cpu").load_from_state_dict(network.module.state_dict()).model.eval(), "spandrel"


def test_picture(size: int) -> np.ndarray:
    """(size, size, 3) uint8: slopes, circles and noise."""
    y, x = np.mgrid[0:size, 0:size] / size
    rings = 0.5 + 0.5 * np.sin(((x - 0.5) ** 2 + (y - 0.4) ** 2) * 300)
    noise = np.random.default_rng(0).normal(0, 0.02, (size, size, 3))
    picture = np.stack([x * 0.5 + rings * 0.5, y, 1 - x * y], -1) + noise
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def host_way(module: nn.Module, picture: np.ndarray, scale: int) -> np.ndarray:
    """Tile by tile through 8 bits, joined row by row with a linear ramp over the overlap."""
    image = Image.fromarray(picture)
    ys, xs = starts(image.height), starts(image.width)
    result = Image.new("RGB", (image.width * scale, image.height * scale))
    for row, y in enumerate(ys):
        strip = Image.new("RGB", (result.width, min(TILE, image.height) * scale))
        for column, x in enumerate(xs):
            tile = image.crop((x, y, x + min(TILE, image.width), y + min(TILE, image.height)))
            with torch.inference_mode():
                done = to_image(module(to_tensor(np.asarray(tile))))
            seen = (xs[column - 1] + TILE - x) * scale if column else 0
            strip.paste(done, (x * scale, 0), ramp(done.size, seen, along_width=True))
        seen = (ys[row - 1] + TILE - y) * scale if row else 0
        result.paste(strip, (0, y * scale), ramp(strip.size, seen, along_width=False))
    return np.asarray(result)


def starts(length: int) -> list[int]:
    """Where the tiles along one axis begin: evenly spread, overlapping by at least OVERLAP."""
    count = max(math.ceil((length - OVERLAP) / (TILE - OVERLAP)), 1)
    step = (length - TILE) / (count - 1) if count > 1 else 0
    return [int(index * step) for index in range(count)]


def ramp(size: tuple[int, int], seen: int, *, along_width: bool) -> Image.Image:
    """A mask that grows from 0 to 255 over the first `seen` pixels, where another tile lies already."""
    length = size[0] if along_width else size[1]
    line = np.minimum(np.arange(length) * 255 // max(seen, 1), 255) if seen else np.full(length, 255)
    plane = np.broadcast_to(line if along_width else line[:, None], (size[1], size[0]))
    return Image.fromarray(plane.astype(np.uint8))


def seams(error: np.ndarray, size: int, scale: int) -> tuple[float, float]:
    """The largest error (0..1) within a tile's overlap in the hosts' way, and in all other places."""
    inside = np.zeros(size * scale, bool)
    begins = starts(size)
    for before, begin in zip(begins, begins[1:], strict=False):
        inside[begin * scale : (before + TILE) * scale] = True
    near = inside[None, :] | inside[:, None]
    worst = error.max(-1)
    return float(worst[near].max(initial=0)), float(worst[~near].max(initial=0))


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def to_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor[0].permute(1, 2, 0).float().numpy()


def to_image(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray((to_array(tensor.clamp(0, 1)) * 255).round().astype(np.uint8))


if __name__ == "__main__":
    main()
