"""How long one picture takes: warm, in a process that has the model, and cold, the whole `diptych generate`.

    python benchmarks/generate_warm_cold.py [--model FOLDER] [--steps 25] [--repeats 5] [--dtype auto]

The warm side is printed beside diffusers' own pipeline with the same weights, steps, guidance and precision, which
stops at the decoded picture; the stages in between are measured alone. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
PROMPT = "a red apple on a sky blue background"


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of `repeats` runs, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def warm(model: str | None, steps: int, repeats: int, dtype: str) -> None:
    """Prints the warm rows."""
    import diffusers
    import torch

    from diptych.pipelines.generation import GenerationRequest, generate
    from diptych.pipelines.loading import load_pipeline

    pipeline = load_pipeline(model, dtype=dtype)
    parts: dict[str, Any] = {name: part for name, part in pipeline.components.items() if name != "upscaler"}
    plain = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    request = GenerationRequest(PROMPT, seed=0, steps=steps)
    ours = median_seconds(lambda: list(generate(pipeline, request)), repeats)
    theirs = median_seconds(
        lambda: plain(
            PROMPT, num_inference_steps=steps, guidance_scale=7.0, generator=torch.Generator().manual_seed(0)
        ),
        repeats,
    )
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    decoded = torch.rand(1, 3, side, side)
    scale = pipeline.upscaler.network.scale
    grow = median_seconds(lambda: pipeline.upscale_pictures(decoded, scale), repeats)
    millions = sum(weight.numel() for weight in pipeline.unet.parameters()) / 1e6
    print(f"UNet of {millions:.1f} M, {side}x{side} pixels, {steps} steps, {pipeline.unet.dtype}")
    print(f"warm, Diptych, enlarged x{scale}: {ours:.2f} s   (of which the GAN: {grow:.3f} s)")
    print(f"warm, diffusers alone, not enlarged: {theirs:.2f} s   ratio {ours / theirs:.2f}")


def cold(model: str | None, steps: int, repeats: int, dtype: str) -> None:
    """Prints the cold row: interpreter, imports, model, picture, file."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "diptych", "generate", PROMPT, "--steps", str(steps), "--dtype", dtype]
    command += ["--model", str(Path(model).resolve())] if model else []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        run = lambda: subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)  # noqa: E731
        whole = median_seconds(run, repeats)
        command[1:] = ["-c", "import torch, diffusers.pipelines.stable_diffusion"]
        imports = median_seconds(run, repeats)
    print(f"cold, the whole process: {whole:.2f} s   (importing torch and diffusers alone: {imports:.2f} s)")


def main() -> None:
    """Runs both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder with an upscaler (default: the embedded model)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    warm(args.model, args.steps, args.repeats, args.dtype)
    cold(args.model, args.steps, args.repeats, args.dtype)


if __name__ == "__main__":
    main()
