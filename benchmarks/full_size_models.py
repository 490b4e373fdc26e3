"""Models of full size, saved as a folder and as a single file, loaded with no network, drawn and enlarged once.

    python benchmarks/full_size_models.py                        # Stable Diffusion 1.5's shape: 2 GB, 6 GiB of memory
    python benchmarks/full_size_models.py --family sdxl          # 7 GB on disk at a time, 12 GiB of memory
    python benchmarks/full_size_models.py --tiny                 # seconds, to try the program out

Random weights in bf16; every load is a process of its own, as `diptych generate` would do it, with the embedded model's
upscaler. Prints seconds to load, to the end of the last step, for decoding and enlarging four times, and the process's
resident memory at its highest. The files are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

FORMS = {"folder": "diffusers folder", "file": "single .safetensors", "ckpt": "single .ckpt"}


def write(family: str, form: str, target: str, tiny: bool) -> None:
    """Saves the model; for a tiny one its configurations too, which a single file does not hold."""
    import torch
    import transformers
    from original_layout import original
    from random_models import components
    from safetensors.torch import save_file

    from diptych import pipelines

    settings: dict[str, Any] = {} if family == "sdxl" else {"requires_safety_checker": False}
    cls = pipelines.DiptychXLPipeline if family == "sdxl" else pipelines.DiptychPipeline
    pipeline = cls(**components(family, torch.bfloat16, tiny), **settings)
    transformers.utils.logging.disable_progress_bar()
    if form == "folder":
        pipeline.save_pretrained(target)
        return
    weights = {key: w.contiguous() for key, w in original(pipeline, "sdxl" if family == "sdxl" else "sd1").items()}
    if form == "ckpt":
        torch.save({"state_dict": weights}, target)
    else:
        save_file(weights, target)


def draw(target: str, size: int, steps: int, config: str | None) -> dict[str, float]:
    """Loads and draws; seconds and GiB."""
    from peak_memory import peak_bytes

    from diptych.pipelines import DiptychPipeline, DiptychUpscaler, DiptychXLPipeline, GenerationRequest, generate
    from diptych.pipelines.loading import load_pipeline, prepare
    from diptych.upscalers.device import pick_device, pick_dtype
    from diptych.upscalers.official import embedded_model

    begun = time.perf_counter()
    upscaler, device = embedded_model() / "upscaler", pick_device("cpu")
    if config is None:
        pipeline = load_pipeline(target, device="cpu", upscaler=upscaler)
    else:  # no file of a published shape
        cls = DiptychXLPipeline if "sdxl" in config else DiptychPipeline
        dtype = pick_dtype(None, device)
        pipeline = cls.from_single_file(
            target, config=config, torch_dtype=dtype, upscaler=DiptychUpscaler.from_name(upscaler).to(dtype)
        )
        prepare(pipeline, device)
    loaded = time.perf_counter()
    steps_begun: list[float] = []
    steps_ended: list[float] = []
    pipeline.unet.register_forward_pre_hook(lambda *_: steps_begun.append(time.perf_counter()))
    pipeline.unet.register_forward_hook(lambda *_: steps_ended.append(time.perf_counter()))
    asked = GenerationRequest("a red apple", seed=0, steps=steps, width=size, height=size, upscale=4)
    picture = next(iter(generate(pipeline, asked)))
    ended = time.perf_counter()
    assert picture.image.size == (4 * size, 4 * size)
    return {
        "load": loaded - begun,
        "steps": steps_ended[-1] - steps_begun[0],
        "finish": ended - steps_ended[-1],
        "peak": peak_bytes(device) / 2**30,
    }


def main() -> None:
    """Writes, draws and deletes one form after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--size", type=int, help="pixels of a side (default: 512, SDXL 1024, tiny 64)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="networks of the same form with hardly any weights")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = args.size or (64 if args.tiny else 1024 if args.family == "sdxl" else 512)
    if args.write:
        write(args.family, *args.write, args.tiny)
        return
    if args.draw:
        print(json.dumps(draw(args.draw[0], size, args.steps, (args.draw[1:] or [None])[0])))
        return
    given = ["--family", args.family, "--size", str(size), "--steps", str(args.steps), *["--tiny"] * args.tiny]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def call(*words: str) -> str:
        command = [sys.executable, __file__, *given, *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    print(f"{args.family}{' (tiny)' if args.tiny else ''}, {size} px, {args.steps} steps, x4, {os.cpu_count()} cores")
    print(f"{'':22s} {'on disk GB':>10s} {'load s':>8s} {'steps s':>8s} {'decode, x4 s':>12s} {'peak GiB':>8s}")
    for form in args.forms:
        with tempfile.TemporaryDirectory() as scratch:
            name = "model" if form == "folder" else f"model.{'ckpt' if form == 'ckpt' else 'safetensors'}"
            target, configs = Path(scratch, name), Path(scratch, f"configs-{args.family}")
            call("--write", form, str(target))
            files = target.rglob("*") if target.is_dir() else [target]
            disk = sum(file.stat().st_size for file in files if file.is_file())
            more = []
            if args.tiny and form != "folder":
                call("--write", "folder", str(configs))
                more = [str(configs)]
            made = json.loads(call("--draw", str(target), *more).splitlines()[-1])
        figures = f"{made['load']:8.2f} {made['steps']:8.2f} {made['finish']:12.2f} {made['peak']:8.2f}"
        print(f"{FORMS[form]:22s} {disk / 1e9:10.2f} {figures}", flush=True)


if __name__ == "__main__":
    main()
