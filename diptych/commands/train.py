"""`diptych train`: one of the three trainers on a configuration file."""

from __future__ import annotations

import argparse
import logging
from importlib import import_module

TRAINERS = {"vae": "diptych.vae.train", "diffusion": "diptych.pipelines.train", "upscaler": "diptych.upscalers.train"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=list(TRAINERS), help="what to train")
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; models/recipes has those of the embedded model")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state of the run's folder")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(import_module(TRAINERS[args.kind]).train(args.config, args.resume))
    return 0
