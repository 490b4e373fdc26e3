"""Puts the finished parts of the embedded model into one folder, in half precision.

The text encoder stays as it is: transformers would load it in half precision, and a plain pipeline then fails on a CPU.

python models/recipes/assemble.py DIFFUSION_MODEL VAE UPSCALER OUTPUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diptych.pipelines import DiptychPipeline
from diptych.pipelines.upscaler import DiptychUpscaler


def main(diffusion: str, vae: str, upscaler: str, output: str) -> None:
    pipeline = DiptychPipeline.from_pretrained(
        diffusion, vae=AutoencoderKL.from_pretrained(vae), upscaler=DiptychUpscaler.from_pretrained(upscaler)
    )
    for half in (pipeline.vae, pipeline.unet, pipeline.upscaler):
        half.to(torch.float16)
    pipeline.save_pretrained(output)
    for name in ("words.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        shutil.copyfile(Path(diffusion) / name, Path(output) / name)
    for config in Path(output).rglob("*.json"):  # where the parts came from says nothing to anybody else
        content = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None):
            config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
