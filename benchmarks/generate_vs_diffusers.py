"""Diptych beside plain diffusers: one guided step, the decode, a whole picture, memory, and how far the pictures agree.

    python benchmarks/generate_vs_diffusers.py                      # Stable Diffusion 1.5's shape, 512 px, 20 steps
    python benchmarks/generate_vs_diffusers.py --family sdxl        # 1024 px; diffusers' fp32 side holds 14 GiB
    python benchmarks/generate_vs_diffusers.py --device cuda        # rows for xformers, sliced attention, compiling
    python benchmarks/generate_vs_diffusers.py --tiny               # seconds, to try the program out

Every row is a process of its own with the same random weights, prompt and seed; it prepares its pipeline as its users
do: diffusers by its defaults (fp32) and in half precision, Diptych as the command line prepares it. On a CPU a few
steps are measured and the others are added at their median, which the table says; `--measure-steps 0` takes them all.
The PSNR is of the pictures after the steps that were taken, against diffusers in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPT, SEED, GUIDANCE = "a red apple on a wooden table, soft light", 0, 7.5
ROWS = {
    "diffusers": "diffusers, fp32",
    "diffusers-half": "diffusers, half precision",
    "diptych": "Diptych",
    "sliced": "Diptych, sliced attention",
    "xformers": "Diptych, xformers",
    "compile": "Diptych, compiled",
}


def measure(row: str, args: argparse.Namespace, picture_file: str) -> dict[str, Any]:
    """One row, in a process of its own; the picture goes into a file."""
    import diffusers
    import numpy as np
    import torch
    from random_models import components

    from diptych import pipelines
    from diptych.pipelines import GenerationRequest, generate
    from diptych.pipelines.loading import prepare
    from diptych.upscalers.device import pick_device, pick_dtype

    device = pick_device(args.device)
    dtype = torch.float32 if row == "diffusers" else pick_dtype(None, device)
    parts = components(args.family, dtype, args.tiny)
    name = "XLPipeline" if args.family == "sdxl" else "Pipeline"
    request = {"width": args.size, "height": args.size, "guidance_scale": GUIDANCE}
    if row.startswith("diffusers"):
        plain = getattr(diffusers, "StableDiffusion" + name)
        settings = {"add_watermarker": False} if args.family == "sdxl" else {"requires_safety_checker": False}
        settings |= {} if args.family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
        pipeline = plain(**parts, **settings).to(device)
        pipeline.set_progress_bar_config(disable=True)

        def draw(steps: int) -> Any:
            generator = torch.Generator().manual_seed(SEED)
            return pipeline(PROMPT, num_inference_steps=steps, generator=generator, **request).images[0]
    else:
        attention = row if row in ("sliced", "xformers") else "sdpa"
        settings = {} if args.family == "sdxl" else {"requires_safety_checker": False}
        pipeline = getattr(pipelines, "Diptych" + name)(**parts, **settings)
        prepare(pipeline, device, attention=attention, compile=row == "compile")

        def draw(steps: int) -> Any:
            asked = GenerationRequest(PROMPT, seed=SEED, steps=steps, upscale=1, **request)
            return next(iter(generate(pipeline, asked))).image

    begun: list[float] = []  # every call of the UNet
    done: list[float] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    pipeline.unet.register_forward_pre_hook(lambda *_: begun.append(now()))
    pipeline.unet.register_forward_hook(lambda *_: done.append(now()))
    taken = args.measure_steps or args.steps
    if row == "compile" or args.warm_up:
        draw(2)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    texts, steps, decodes, wholes = [], [], [], []
    for _ in range(args.repeats):
        begun.clear()
        started = now()
        picture = draw(taken)
        ended = now()
        each = [after - before for before, after in zip(begun, begun[1:], strict=False)]
        step = statistics.median(each[1:] or each)  # the first one prepares kernels
        texts.append(begun[0] - started)
        steps.append(step)
        decodes.append(ended - done[-1])
        wholes.append(ended - started + (args.steps - taken) * step)
    np.save(picture_file, np.asarray(picture))
    middle = statistics.median
    from peak_memory import peak_bytes

    figures = {"text": middle(texts), "step": middle(steps), "decode": middle(decodes), "whole": middle(wholes)}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return figures | {"peak": peak_bytes(device) / 2**30, "dtype": str(dtype).removeprefix("torch."), "device": card}


def psnr(picture: Any, reference: Any) -> float:
    """dB, of two 8-bit pictures."""
    import numpy as np

    difference = (picture.astype(np.float64) - reference.astype(np.float64)) / 255
    return float(-10 * np.log10(np.square(difference).mean() + 1e-12))


def main() -> None:
    """Runs every row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, help="pixels of a side (default: 512, SDXL 1024, tiny 64)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure-steps", type=int, help="0: all (default: 3 on a CPU, all on a GPU)")
    parser.add_argument("--repeats", type=int, help="medians over so many pictures (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--warm-up", action="store_true", help="draw once before (always on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(default: the first three on a CPU, all on a GPU)")
    parser.add_argument("--tiny", action="store_true", help="networks of the same form with hardly any weights")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    args.size = args.size or (64 if args.tiny else 1024 if args.family == "sdxl" else 512)
    args.repeats = args.repeats or (5 if on_gpu else 1)
    args.warm_up = args.warm_up or on_gpu
    if args.measure_steps is None:
        args.measure_steps = 0 if on_gpu else min(3, args.steps)
    if args.one:
        print(json.dumps(measure(args.one[0], args, args.one[1])))
        return
    rows = args.rows or list(ROWS)[: None if on_gpu else 3]
    run_rows(rows, args)


def run_rows(rows: list[str], args: argparse.Namespace) -> None:
    """Prints each row when it is there; the ratios are to the first one."""
    import numpy as np

    size = f"{args.size}x{args.size}"
    print(f"{args.family}{' (tiny)' if args.tiny else ''}, {size}, guidance {GUIDANCE}, {os.cpu_count()} cores")
    counted = args.measure_steps or args.steps
    if counted < args.steps:
        print(f"whole picture: {counted} steps measured, {args.steps - counted} added at their median")
    head = f"{'':28s} {'dtype':>9s} {'text s':>8s} {'step s':>8s} {'decode s':>8s} {'whole s':>8s} {'peak GiB':>8s}"
    print(f"{head}   {'PSNR dB':>8s}   ratio: step  decode   whole    peak")
    given = ["--family", args.family, "--size", str(args.size), "--steps", str(args.steps), "--device", args.device]
    given += ["--measure-steps", str(args.measure_steps), "--repeats", str(args.repeats)]
    given += ["--warm-up"] * args.warm_up + ["--tiny"] * args.tiny
    first: dict[str, Any] | None = None
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            file = str(Path(folder, f"{row}.npy"))
            command = [sys.executable, __file__, *given, "--one", row, file]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{ROWS[row]:28s} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}", flush=True)
                continue
            made = json.loads(done.stdout.splitlines()[-1])
            picture = np.load(file)
            if first is None:
                print(f"device: {made['device']}")
                first, reference = made, picture
            figures = " ".join(f"{made[name]:8.3f}" for name in ("text", "step", "decode", "whole", "peak"))
            ratios = " ".join(f"{made[name] / first[name]:7.3f}" for name in ("step", "decode", "whole", "peak"))
            likeness = "" if row == rows[0] else f"{psnr(picture, reference):.1f}"
            print(f"{ROWS[row]:28s} {made['dtype']:>9s} {figures}   {likeness:>8s}       {ratios}", flush=True)


if __name__ == "__main__":
    main()
