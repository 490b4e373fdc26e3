"""Ours, Real-ESRGAN's RealESRGANer (whole, and tiled with tile=128, tile_pad=10) and spandrel, on the same weights.

    python benchmarks/upscale_vs_peers.py [--networks rrdb23 srvgg32 srvgg16] [--side 256] [--repeats 3]
                                          [--picture FILE] [--weights FILE] [--device cpu] [--dtype auto]

Runs in an environment with spandrel and, where it is installed, basicsr and realesrgan; a runner that is not
there is named and left out. Without --weights the networks have random weights of fixed seed, scaled so that the result
is a picture. Prints medians over interleaved repeats, ratios to ours, PSNR of every result against the
network in fp32 in one piece, and the most memory the process held during each runner (a process of its own each).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SPECS = {
    "rrdb23": ("RRDBNet", 23),
    "rrdb6": ("RRDBNet", 6),
    "srvgg32": ("SRVGGNetCompact", 32),
    "srvgg16": ("SRVGGNetCompact", 16),
}
RUNNERS = ("ours", "realesrganer-tiled", "realesrganer-whole", "spandrel")
Run = Callable[[np.ndarray], np.ndarray]


def random_weights(name: str, path: Path) -> None:
    """A checkpoint as Real-ESRGAN writes it, whose output looks like its input, somewhat changed."""
    import torch

    from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact

    torch.manual_seed(0)
    family, depth = SPECS[name]
    network = RRDBNet(num_block=depth) if family == "RRDBNet" else SRVGGNetCompact(num_conv=depth)
    weights = network.state_dict()
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 32)
        out = network(x)
        last = max(
            (key for key in weights if key.endswith("weight") and weights[key].ndim == 4), key=list(weights).index
        )
        gain = (
            0.2 / out.std()
            if family == "RRDBNet"
            else 0.05 / (out - x.repeat_interleave(4, 2).repeat_interleave(4, 3)).std()
        )
        weights[last] *= gain
        weights[last.replace("weight", "bias")] += 0.5 if family == "RRDBNet" else 0.0
    torch.save({"params_ema": weights}, path)


def test_picture(side: int) -> np.ndarray:
    """(side, side, 3) uint8: shades, edges and grain."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin((x * (3 + k) + y * (5 - k)) * 6) * 60 + 90 + 60 * ((x * 8 + y * 3 + k) % 1 > 0.5) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 6, (side, side, 3))
    return (np.stack(waves, 2) + grain).clip(0, 255).astype(np.uint8)


def make_runner(runner: str, name: str, weights: str, device: str, dtype: str) -> Run:
    """A function from (H, W, 3) RGB uint8 to the enlarged picture. Raises ImportError for what is not installed."""
    import torch

    family, depth = SPECS[name]
    if runner == "ours":
        from diptych.upscalers import Upscaler

        upscaler = Upscaler.from_pretrained(weights, device=device, dtype=dtype)
        print(f"{name}: ours runs on {upscaler.device} in {upscaler.dtype}", file=sys.stderr)
        return upscaler.upscale
    if runner == "spandrel":
        from spandrel import ModelLoader

        descriptor = ModelLoader(device=device).load_from_file(weights)

        def run_spandrel(picture: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                x = torch.from_numpy(picture).to(device).permute(2, 0, 1)[None].float().div_(255)
                return descriptor(x)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()

        return run_spandrel
    if "torchvision.transforms.functional_tensor" not in sys.modules:  # removed in torchvision 0.17; basicsr needs it
        from torchvision.transforms.functional import rgb_to_grayscale

        shim = types.ModuleType("torchvision.transforms.functional_tensor")
        shim.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[shim.__name__] = shim
    from basicsr.archs.rrdbnet_arch import RRDBNet
    from realesrgan import RealESRGANer
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    model = (
        RRDBNet(num_in_ch=3, num_out_ch=3, num_feat=64, num_block=depth, num_grow_ch=32, scale=4)
        if family == "RRDBNet"
        else SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=64, num_conv=depth, upscale=4, act_type="prelu")
    )
    tile = 128 if runner.endswith("tiled") else 0
    half = device.startswith("cuda")
    peer = RealESRGANer(
        4, weights, model=model, tile=tile, tile_pad=10, pre_pad=0, half=half, device=torch.device(device)
    )
    return lambda picture: peer.enhance(picture[..., ::-1])[0][..., ::-1]


def reference(weights: str, picture: np.ndarray) -> np.ndarray:
    """The network in fp32 in one piece, in 0..1."""
    import torch

    from diptych.upscalers import load_network_file

    with torch.inference_mode():
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float().div_(255)
        return load_network_file(weights).module(x)[0].clamp(0, 1).permute(1, 2, 0).numpy()


def psnr(out: np.ndarray, exact: np.ndarray) -> float:
    """In dB, of uint8 against 0..1."""
    error = float(np.mean((out / 255.0 - exact) ** 2))
    return -10 * math.log10(error) if error else math.inf


def peak_memory(runner: str, name: str, weights: str, side: int, device: str, dtype: str) -> float:
    """MiB of resident memory at most, of a process that runs `runner` once."""
    command = [sys.executable, __file__, "--one", runner, name, weights, str(side), device, dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["rrdb23", "srvgg32", "srvgg16"], choices=SPECS)
    parser.add_argument("--side", type=int, default=256, help="of the test picture in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="instead of the test picture")
    parser.add_argument("--weights", help="a checkpoint of the one network named, instead of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import resource

        runner, name, weights, side, device, dtype = args.one
        make_runner(runner, name, weights, device, dtype)(test_picture(int(side)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if args.picture:
        from PIL import Image

        picture = np.asarray(Image.open(args.picture).convert("RGB"))
    else:
        picture = test_picture(args.side)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            weights = args.weights or str(Path(folder) / f"{name}.pth")
            if not args.weights:
                random_weights(name, Path(weights))
            runs: dict[str, Run] = {}
            for runner in RUNNERS:
                try:
                    runs[runner] = make_runner(runner, name, weights, args.device, args.dtype)
                except ImportError as error:
                    print(f"{runner} is left out: {error}", file=sys.stderr)
            seconds: dict[str, list[float]] = {runner: [] for runner in runs}
            outputs = {runner: run(picture) for runner, run in runs.items()}  # the first run is not counted
            for _ in range(args.repeats):
                for runner, run in runs.items():
                    started = time.perf_counter()
                    run(picture)
                    seconds[runner].append(time.perf_counter() - started)
            exact = reference(weights, picture)
            medians = {runner: statistics.median(times) for runner, times in seconds.items()}
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            print(f"\n{name} {size} x4    seconds   ours/this   PSNR to fp32   peak MiB")
            for runner, median in medians.items():
                memory = peak_memory(runner, name, weights, args.side, args.device, args.dtype)
                quality, ratio = psnr(outputs[runner], exact), medians["ours"] / median
                print(f"  {runner:20s} {median:9.3f} {ratio:11.3f} {quality:14.1f} {memory:10.0f}")
                if args.json:
                    print(
                        json.dumps(
                            {"network": name, "runner": runner, "seconds": median, "ratio": ratio, "psnr": quality}
                        )
                    )


if __name__ == "__main__":
    main()
