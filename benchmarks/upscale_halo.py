"""How much tiles change with a halo narrower than the receptive radius: the error of each halo, for given weights.

    python benchmarks/upscale_halo.py WEIGHTS [--picture FILE] [--side 256] [--tile 64] [--halos 8 16 24 32 48 64]

WEIGHTS is whatever `diptych upscale --upscaler` takes. Weights of 23 blocks that were trained are had by
`diptych train upscaler` with the [model] table of docs/upscaling.md, in minutes where they may be narrow. The picture
(its middle, `side` pixels) is enlarged in one piece and in tiles, in fp32. Printed, in levels of 8 bits: the largest
difference, the one that 99.9 % of values stay below, and the share of values that differ by less than one level.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diptych.upscalers import Upscaler, upscale_tensor
from diptych.upscalers.runner import halo_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", help="a name, a file or a folder of a network")
    parser.add_argument("--picture", type=Path, help="instead of shades, edges and grain")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--halos", type=int, nargs="+", default=[8, 16, 24, 32, 48, 64])
    args = parser.parse_args()
    network = Upscaler.from_pretrained(args.weights, device="cpu", dtype="fp32").network
    picture = _middle(args.picture, args.side) if args.picture else _shades(args.side)
    options = {"scale": network.scale, "multiple": network.multiple}
    print(f"{network.architecture} {network.hyperparameters}, radius {network.radius}, default halo {halo_of(network)}")
    print("halo   worst  99.9 %   share below one level")
    with torch.inference_mode():
        whole = network.module(picture).clamp(0, 1)
        for halo in args.halos:
            tiled = upscale_tensor(network.module, picture, halo=halo, tile=args.tile, **options)
            levels = ((tiled - whole).abs() * 255).flatten().numpy()
            share = 100 * float((levels < 1).mean())
            print(f"{halo:4d} {levels.max():7.3f} {np.quantile(levels, 0.999):7.4f}   {share:.4f} %", flush=True)


def _middle(path: Path, side: int) -> torch.Tensor:
    from PIL import Image

    with Image.open(path) as image:
        left, top = (max(length - side, 0) // 2 for length in image.size)
        pixels = np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


def _shades(side: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    planes = [0.4 + 0.25 * torch.sin((x * (3 + k) + y * (5 - k)) * 6) + 0.2 * ((x * 8 + y * 3) % 1) for k in range(3)]
    grain = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(0))
    return (torch.stack(planes)[None] + 0.02 * grain).clamp(0, 1)


if __name__ == "__main__":
    main()
