"""Ours, Real-ESRGAN's RealESRGANer (whole, and with tile=128, tile_pad=10) and spandrel on one picture and weights.

    python benchmarks/upscale_vs_peers.py [--networks rrdb23 srvgg32] [--side 256] [--repeats 3] [--device cpu|cuda]
                                          [--picture FILE] [--weights FILE] [--compile] [--isa AVX2 | --isa ""]

Runs in an environment with spandrel, basicsr and realesrgan (`pip install --no-deps realesrgan`); a runner that is not
there is named and left out. All run in one process and take turns; the table has the median of their times, our time
divided by theirs (below 1: we are faster; ours is the row "auto"), PSNR of their pictures against the network in
fp32 in one piece and against ours, and the most memory a process that does nothing else held (on CUDA: GPU memory).
On a CPU all of it is then done again in a process without bf16 (ONEDNN_MAX_CPU_ISA=AVX2).

Without --weights the networks have random weights of fixed seed, scaled so that the result is a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diptych.upscalers import RRDBNet, SRVGGNetCompact, Upscaler, load_network_file
from diptych.upscalers.device import pick_dtype

DEPTHS = {"rrdb23": 23, "rrdb6": 6, "srvgg32": 32, "srvgg16": 16}
PEERS = ("RealESRGANer tiled", "RealESRGANer whole", "spandrel")
Run = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["rrdb23", "srvgg32"], choices=DEPTHS)
    parser.add_argument("--side", type=int, default=256, help="of the test picture in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="instead of the test picture")
    parser.add_argument("--weights", help="a checkpoint of the one network named, instead of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="a row for our network compiled")
    parser.add_argument("--isa", default="AVX2", help="for the second table on a CPU; empty: none")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.one[1], args.one[2], args.one[3], args.device)
        return
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()}, ISA {limit}"
    print(f"{args.device} ({machine}), {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.npy")
        np.save(picture, _test_picture(args.side) if args.picture is None else _read(args.picture))
        for name in args.networks:
            weights = args.weights or str(Path(folder, f"{name}.pth"))
            if not args.weights:
                random_weights(name, Path(weights))
            compare(name, weights, picture, args)
    if args.device == "cpu" and args.isa and limit == "all":
        print(flush=True)
        subprocess.run([sys.executable, *sys.argv], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": args.isa})


def compare(name: str, weights: str, picture_file: Path, args: argparse.Namespace) -> None:
    """Prints the table of one network."""
    picture = np.load(picture_file)
    fastest = str(pick_dtype("auto", torch.device(args.device))).removeprefix("torch.")
    ours = ["ours auto", *(["ours float32"] if fastest != "float32" else []), *(["ours compiled"] * args.compile)]
    runs: dict[str, Run] = {}
    for runner in (*ours, *PEERS):
        try:
            runs[runner] = make_runner(runner, name, weights, args.device)
        except ImportError as error:
            print(f"{runner} is left out: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {runner: [] for runner in runs}
    outputs: dict[str, np.ndarray] = {}
    for repeat in range(args.repeats + 1):
        for runner, run in runs.items():
            started = time.perf_counter()
            outputs[runner] = run(picture if repeat else picture[:48, :48])  # the first, small, only warms up
            if repeat:
                times[runner].append(time.perf_counter() - started)
    medians = {runner: statistics.median(taken) for runner, taken in times.items()}
    exact = reference(weights, picture, args.device)
    size = f"{name}, {picture.shape[1]}x{picture.shape[0]} to {exact.shape[1]}x{exact.shape[0]}"
    print(f"\n{size:40s} seconds  ours/this  dB to fp32  dB to ours  peak MiB", flush=True)
    for runner, median in medians.items():
        label = f"{runner} ({_dtype_of(runner, runs[runner], args.device)})"
        decibels = psnr(outputs[runner] / 255.0, exact), psnr(outputs[runner] / 255.0, outputs["ours auto"] / 255.0)
        memory = peak_memory(runner, name, weights, picture_file, args.device)
        ratio = medians["ours auto"] / median
        print(
            f"  {label:38s} {median:7.3f} {ratio:10.3f} {decibels[0]:11.1f} {decibels[1]:11.1f} {memory:9.0f}",
            flush=True,
        )


def make_runner(runner: str, name: str, weights: str, device: str) -> Run:
    """A function from (H, W, 3) RGB uint8 to the enlarged picture. Raises ImportError for what is not installed."""
    if runner.startswith("ours"):
        dtype = runner.removeprefix("ours ") if runner != "ours compiled" else "auto"
        return Upscaler.from_pretrained(weights, device=device, dtype=dtype, compile=runner == "ours compiled").upscale
    if runner == "spandrel":
        from spandrel import ModelLoader

        descriptor = ModelLoader(device=device).load_from_file(weights)

        def run_spandrel(picture: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                x = torch.from_numpy(picture).to(device).permute(2, 0, 1)[None].float().div_(255)
                return descriptor(x)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()

        return run_spandrel
    _let_basicsr_import()
    from basicsr.archs.rrdbnet_arch import RRDBNet as PeersRRDBNet
    from realesrgan import RealESRGANer
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact as PeersSRVGG

    model = (
        PeersRRDBNet(num_in_ch=3, num_out_ch=3, num_feat=64, num_block=DEPTHS[name], num_grow_ch=32, scale=4)
        if name.startswith("rrdb")
        else PeersSRVGG(num_in_ch=3, num_out_ch=3, num_feat=64, num_conv=DEPTHS[name], upscale=4, act_type="prelu")
    )
    peer = RealESRGANer(
        scale=4,
        model_path=weights,
        model=model,
        tile=128 if runner.endswith("tiled") else 0,
        tile_pad=10,
        pre_pad=0,
        half=device.startswith("cuda"),  # as its own command does: fp16 on a GPU
        device=torch.device(device),
    )

    def run_peer(picture: np.ndarray) -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every tile
            return peer.enhance(np.ascontiguousarray(picture[..., ::-1]))[0][..., ::-1]

    return run_peer


def _let_basicsr_import() -> None:
    """basicsr needs a module that torchvision 0.17 removed, for one function of it."""
    missing = "torchvision.transforms.functional_tensor"
    if missing not in sys.modules:
        from torchvision.transforms.functional import rgb_to_grayscale

        sys.modules[missing] = types.ModuleType(missing)
        sys.modules[missing].rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]


def _dtype_of(runner: str, run: Run, device: str) -> str:
    if runner.startswith("ours"):
        return str(run.__self__.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
    return "float16" if runner.startswith("RealESRGANer") and device.startswith("cuda") else "float32"


def reference(weights: str, picture: np.ndarray, device: str) -> np.ndarray:
    """The network in fp32 in one piece, in 0..1."""
    with torch.inference_mode():
        x = torch.from_numpy(picture).to(device).permute(2, 0, 1)[None].float().div_(255)
        made = load_network_file(weights).module.to(device)(x)
        return made[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def psnr(out: np.ndarray, exact: np.ndarray) -> float:
    """In dB, of values in 0..1."""
    error = float(np.mean((out - exact) ** 2))
    return -10 * math.log10(error) if error else math.inf


def peak_memory(runner: str, name: str, weights: str, picture: Path, device: str) -> float:
    """MiB held at most by a process that runs `runner` once."""
    command = [sys.executable, __file__, "--device", device, "--one", runner, name, weights, str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def one(runner: str, name: str, weights: str, picture: str, device: str) -> None:
    """In that process: prints the number."""
    from peak_memory import peak_bytes

    make_runner(runner, name, weights, device)(np.load(picture))
    print(peak_bytes(torch.device(device)) / 2**20)


def random_weights(name: str, path: Path) -> None:
    """A checkpoint as Real-ESRGAN writes it, whose output looks like its input, somewhat changed."""
    torch.manual_seed(0)
    rrdb = name.startswith("rrdb")
    network = RRDBNet(num_block=DEPTHS[name]) if rrdb else SRVGGNetCompact(num_conv=DEPTHS[name])
    weights = network.state_dict()
    last = "conv_last" if rrdb else f"body.{2 * DEPTHS[name] + 2}"
    with torch.no_grad():
        x = torch.rand(1, 3, 32, 32)
        added = network(x) if rrdb else network(x) - x.repeat_interleave(4, 2).repeat_interleave(4, 3)
        weights[f"{last}.weight"] *= (0.2 if rrdb else 0.05) / added.std()
        weights[f"{last}.bias"] += 0.5 if rrdb else 0.0
    torch.save({"params_ema": weights}, path)


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _test_picture(side: int) -> np.ndarray:
    """(side, side, 3) uint8: shades, edges and grain."""
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin((x * (3 + k) + y * (5 - k)) * 6) * 60 + 90 + 60 * ((x * 8 + y * 3 + k) % 1 > 0.5) for k in range(3)]
    grain = np.random.default_rng(0).normal(0, 6, (side, side, 3))
    return (np.stack(waves, 2) + grain).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
