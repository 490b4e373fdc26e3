"""Refining in tiles against refining as a whole, on pictures of the embedded model (or of any other).

    python benchmarks/refine_tiles.py [--model FOLDER] [--upscale 2] [--refine 0.3 0.6] [--overlap 0.125 0.25 0.5]
                                      [--pictures 4] [--steps 25] [--save FOLDER]

Every picture is drawn and enlarged once; then the same latents are drawn anew with the same noise, whole, in tiles of
the model's native size, and in tiles that do not overlap and are not blended. Prints, as means over the pictures: the
PSNR against the whole; the mean step between neighbouring pixels across borders of tiles divided by the mean step
elsewhere (1: the borders cannot be told), beside the same at these places in the picture drawn whole; and the seconds.
Borders are those of each tile's own ground, in the middle of the overlaps, where they lie on average over the steps.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
PROMPTS = (
    "a red apple on a sky blue background",
    "a violin next to a cat",
    "a sunflower on a dark green background",
    "a rocket above a house",
)


def borders(length: int, tile: int, overlap: int, factor: int) -> list[int]:
    """Pixels in front of which one tile's ground ends and the next one's begins."""
    from diptych.pipelines.refine import _places

    places = _places(length, tile, overlap)
    return [(a + tile + b) * factor // 2 for (a, _), (b, _) in zip(places, places[1:], strict=False)]


def steps_across(picture: Any, rows: list[int], columns: list[int]) -> float:
    """The mean step across the borders over the mean step elsewhere. picture: (1, 3, H, W)."""
    import torch

    ratios = []
    for axis, at in ((2, rows), (3, columns)):
        steps = picture.diff(dim=axis).abs().mean(dim=[0, 1, 5 - axis])
        across = torch.zeros(len(steps), dtype=torch.bool)
        across[[border - 1 for border in at]] = True
        if at:
            ratios.append((steps[across].mean() / steps[~across].mean()).item())
    return sum(ratios) / len(ratios)


def redraw(pipeline: Any, wish: dict[str, Any], overlap: float | None) -> tuple[Any, float]:
    """The picture, (1, 3, H, W), drawn anew in tiles, or whole for None; and the seconds."""
    from diptych.pipelines.refine import in_tiles

    size = (wish["image"].shape[2], wish["image"].shape[3])
    tiles = nullcontext() if overlap is None else in_tiles(pipeline, size, overlap=overlap, whole=0)
    started = time.perf_counter()
    with tiles:
        made = pipeline(**wish).images
    return made.float().cpu(), time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder with an upscaler (default: the embedded model)")
    parser.add_argument("--upscale", type=float, default=2)
    parser.add_argument("--refine", type=float, nargs="+", default=[0.3, 0.6])
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--save", help="a folder for the pictures")
    args = parser.parse_args()

    from diptych.pipelines.diptych import in_task
    from diptych.pipelines.loading import load_pipeline
    from diptych.pipelines.refine import steps_for

    pipeline = load_pipeline(args.model, dtype="fp32")
    again = in_task(pipeline, "Img2Img")
    native = pipeline.unet.config.sample_size
    side = int(native * pipeline.vae_scale_factor * args.upscale)
    rows: dict[tuple[float, str], list[tuple[float, float, float, float]]] = {}
    for index in range(args.pictures):
        prompt = PROMPTS[index % len(PROMPTS)]
        how = {"num_inference_steps": args.steps, "guidance_scale": 7.0, "seed": index}
        latents = pipeline(prompt, output_type="latent", **how).images
        larger = pipeline.larger_latents(latents, args.upscale, (side, side))
        for refine in args.refine:
            how["num_inference_steps"] = steps_for(max(int(args.steps * refine), 1), refine)

            wish = {"prompt": prompt, "image": larger, "strength": refine, "output_type": "pt", **how}
            whole, seconds = redraw(again, wish, None)
            _save(args.save, f"{index}-{refine:g}-whole", whole)
            rows.setdefault((refine, "whole"), []).append((math.inf, 1.0, 1.0, seconds))
            for overlap in [0.0, *args.overlap]:
                made, seconds = redraw(again, wish, overlap)
                name = f"tiles, {overlap:g} overlap" if overlap else "tiles, no overlap"
                _save(args.save, f"{index}-{refine:g}-{overlap:g}", made)
                common = round(native * overlap)
                at = borders(larger.shape[2], native, common, pipeline.vae_scale_factor)
                psnr = -10 * math.log10(max((made - whole).square().mean().item(), 1e-12))
                told = (psnr, steps_across(made, at, at), steps_across(whole, at, at), seconds)
                rows.setdefault((refine, name), []).append(told)
    print(f"{side}x{side} from {native * pipeline.vae_scale_factor}, {args.steps} steps, {args.pictures} pictures")
    print("refine  how                     PSNR to whole   step across / elsewhere   (in the whole)   seconds")
    for (refine, name), values in rows.items():
        psnr, across, before, seconds = (sum(column) / len(column) for column in zip(*values, strict=True))
        print(f"{refine:<7g} {name:24s} {psnr:9.1f} dB   {across:18.3f}   {before:19.3f}   {seconds:9.2f}")


def _save(folder: str | None, name: str, picture: Any) -> None:
    if folder is not None:
        from diptych.pipelines.saving import to_pil

        Path(folder).mkdir(parents=True, exist_ok=True)
        to_pil([picture], (picture.shape[3], picture.shape[2])).save(Path(folder, f"{name}.png"))


if __name__ == "__main__":
    main()
