"""From latents to a picture file: the exact strips and the GAN behind them, against diffusers' decode and then the GAN.

    python benchmarks/latents_to_file.py [--size 1024] [--network rrdb|srvgg] [--dtype auto] [--narrow] [--repeats 1]

An SDXL-shaped VAE with random weights decodes latents of `size` pixels, the GAN enlarges four times, and a PNG is
written, each way in processes of its own. Prints the seconds (medians) and their ratio, and the most memory above what
is there with the models loaded and warmed up on a small picture; then how far strips and whole decode are apart, beside
how far the whole decode in that precision is from fp32. --narrow takes a VAE of an eighth of the width, for a smoke
test; --no-compare leaves the last lines out (they decode in fp32 too).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
SCALE = 4


def autoencoder(narrow: bool, dtype: Any) -> Any:
    """SDXL's, with random weights; its encoder is not needed."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    channels = (16, 32, 64, 64) if narrow else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16 if narrow else 32,
        scaling_factor=0.13025,
    )
    del vae.encoder
    return torch.nn.Module.to(vae, dtype).to(memory_format=torch.channels_last).eval()


def pipeline_of(network: str, narrow: bool, dtype_name: str) -> Any:
    """A pipeline that has the VAE and the GAN, and of the rest nothing."""
    import torch

    from diptych.pipelines import DiptychPipeline, DiptychUpscaler
    from diptych.upscalers.device import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype(dtype_name, device)
    torch.manual_seed(1)
    upscaler = DiptychUpscaler("RRDBNet" if network == "rrdb" else "SRVGGNetCompact", **_widths(network, narrow))
    torch.nn.Module.to(upscaler, dtype).to(memory_format=torch.channels_last)
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "unet", "scheduler"))
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return DiptychPipeline(vae=autoencoder(narrow, dtype), upscaler=upscaler, **parts).to(device)


def _widths(network: str, narrow: bool) -> dict[str, int]:
    if network == "rrdb":
        return {"num_feat": 16, "num_block": 1, "num_grow_ch": 8} if narrow else {}
    return {"num_feat": 16, "num_conv": 2} if narrow else {"num_conv": 32}


def latents_of(size: int) -> Any:
    """Those of a smooth random picture, as a UNet gives them."""
    import torch

    small = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(small, size=(size // 8, size // 8), mode="bicubic")


class Memory:
    """The most resident memory of this process, above that at the beginning, in MiB. On a GPU, its memory."""

    def __enter__(self) -> Memory:
        import torch

        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._start, self.most, self._end = self._now(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self._end.set()
        self._thread.join()
        self.most -= self._start
        if self._cuda:
            self.most = torch.cuda.max_memory_allocated() / 2**20 - self._start

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            self.most = max(self.most, self._now())

    def _now(self) -> float:
        import psutil
        import torch

        return (torch.cuda.memory_allocated() if self._cuda else psutil.Process().memory_info().rss) / 2**20


def one(way: str, size: int, network: str, narrow: bool, dtype: str, folder: str) -> None:
    """In the process that is measured: prints MiB above the models, and seconds."""
    import torch

    from diptych.pipelines.saving import to_file
    from diptych.upscalers.sources import TensorSource

    pipeline = pipeline_of(network, narrow, dtype)
    file = Path(folder, f"{way}.png")

    def strips(latents: Any) -> None:
        pipeline.decode_to_file(latents, file, upscale=SCALE)

    @torch.no_grad()
    def whole(latents: Any) -> None:
        vae = pipeline.vae
        scaled = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
        picture = (vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)
        sides = (picture.shape[3] * SCALE, picture.shape[2] * SCALE)
        to_file(file, pipeline.enlarged(TensorSource(picture), SCALE), sides)

    run = strips if way == "strips" else whole
    run(latents_of(64))
    latents = latents_of(size)
    with Memory() as memory:
        started = time.perf_counter()
        run(latents)
        seconds = time.perf_counter() - started
    print(memory.most, seconds)


def compare(size: int, narrow: bool, dtype_name: str) -> None:
    """Prints how far apart the decodes are, in levels of 8 bits."""
    import torch

    from diptych.pipelines.strips import decode_strips
    from diptych.upscalers.device import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype(dtype_name, device)

    def levels(picture: Any) -> Any:
        return (picture.float() / 2 + 0.5).clamp(0, 1) * 255

    with torch.no_grad():
        latents = (latents_of(size) / 0.13025).to(device)
        made = {}
        for kind in dict.fromkeys((torch.float32, dtype)):
            vae = autoencoder(narrow, kind).to(device)
            made["whole", kind] = levels(vae.decode(latents.to(kind)).sample)
            made["strips", kind] = levels(torch.cat(list(decode_strips(vae, latents.to(kind))), 2))
    for kind in dict.fromkeys((torch.float32, dtype)):
        _tell(f"strips against whole, {kind}", made["strips", kind] - made["whole", kind])
    if dtype is not torch.float32:
        for way in ("whole", "strips"):
            _tell(f"{way} in {dtype} against whole in fp32", made[way, dtype] - made["whole", torch.float32])


def _tell(what: str, apart: Any) -> None:
    print(f"{what}: at most {apart.abs().max().item():.3f}/255, rms {apart.square().mean().sqrt().item():.4f}/255")


def main() -> None:
    """Runs both ways and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--network", choices=("rrdb", "srvgg"), default="srvgg")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-compare", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.size, args.network, args.narrow, args.dtype, args.one[1])
        return
    print(f"latents of {args.size} px to a PNG of {SCALE * args.size} px, {args.network}, {args.dtype}")
    medians = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("strips", "whole"):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way, folder]
            runs = []
            for _ in range(args.repeats):
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(tuple(map(float, done.stdout.split())))
            most, seconds = (statistics.median(column) for column in zip(*runs, strict=True))
            medians[way] = seconds
            name = "Diptych, in strips" if way == "strips" else "diffusers' decode, then the GAN"
            print(f"{name:32s} {seconds:8.1f} s   {most:7.0f} MiB above the loaded models", flush=True)
    print(f"time ratio, strips to whole: {medians['strips'] / medians['whole']:.2f}")
    if not args.no_compare:
        compare(args.size, args.narrow, args.dtype)


if __name__ == "__main__":
    main()
