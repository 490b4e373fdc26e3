"""The most memory that `upscale_file` holds, for pictures of one width and three heights, and for 6000 x 4000.

    python benchmarks/upscale_memory.py [--width 2000] [--heights 1000 2000 4000] [--format png] [--network srvgg16]
    python benchmarks/upscale_memory.py --width 6000 --heights 4000          # the picture of 24000 x 16000

Every picture is enlarged by a process of its own. Prints resident memory at its highest, what of it is there before the
picture is opened (Python and torch), the decoded input, and the rest: what grows with the width, not with the height.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def one(src: str, dst: str, weights: str, dtype: str) -> None:
    """In the process that is measured: prints MiB before and at most, and seconds."""
    from peak_memory import peak_bytes

    from diptych.upscalers import Upscaler

    upscaler = Upscaler.from_pretrained(weights, device="cpu", dtype=dtype)
    before = peak_bytes() / 2**20
    started = time.perf_counter()
    upscaler.upscale_file(src, dst)
    seconds = time.perf_counter() - started
    print(before, peak_bytes() / 2**20, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--heights", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--format", choices=("png", "tif"), default="png")
    parser.add_argument("--network", default="srvgg16", help="srvggN: an SRVGGNetCompact of N convolutions")
    parser.add_argument("--features", type=int, default=64, help="channels of the network")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    import torch
    from PIL import Image

    from diptych.upscalers import SRVGGNetCompact, Upscaler, load_network

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        network = SRVGGNetCompact(num_feat=args.features, num_conv=int(args.network.removeprefix("srvgg")))
        Upscaler(load_network(network.state_dict()), device="cpu", dtype="fp32").save_pretrained(folder)
        print("input          output          MiB: start   input  at most    rest   Mpx/s (input)")
        for height in args.heights:
            src, dst = Path(folder, "in.png"), Path(folder, f"out.{args.format}")
            rows = np.linspace(0, 255, args.width, dtype=np.uint8)
            picture = np.stack([rows + shift for shift in (0, 60, 120)], 1)[None].repeat(height, 0)
            Image.fromarray(picture).save(src, compress_level=1)
            command = [sys.executable, __file__, "--one", str(src), str(dst), folder, args.dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            start, most, seconds = map(float, done.stdout.split())
            size, grown = f"{args.width}x{height}", f"{4 * args.width}x{4 * height}"
            decoded = picture.nbytes / 2**20
            speed = args.width * height / seconds / 1e6
            rest = most - start - decoded
            print(
                f"{size:14s} {grown:14s} {start:12.0f} {decoded:7.0f} {most:8.0f} {rest:7.0f} {speed:11.2f}", flush=True
            )


if __name__ == "__main__":
    main()
