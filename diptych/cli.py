"""The `diptych` program: finds the command, runs it, turns errors into one line and an exit status.

Exit status: 0 all done, 1 some input failed and the others were done, 2 wrong usage, 130 interrupted.
Each command lives in `diptych.commands.NAME` with two functions: `add_arguments(parser)`, which must be cheap (no
torch, no third-party import), and `run(args) -> int`, which may import what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from diptych import __version__
from diptych.errors import Cancelled, DiptychError

COMMANDS = {
    "generate": "prompts to pictures",
    "upscale": "enlarge pictures with a GAN",
    "ui": "the page and the /sdapi/v1 service",
    "train": "train a VAE, a diffusion model or an upscaler",
    "models": "list the models and networks at hand, download official ones",
    "install-extension": "put the upscaler extension into Automatic1111 or Forge",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole parser, or only what `command` needs (the other commands keep their one-line help)."""
    parser = argparse.ArgumentParser(
        prog="diptych", description="A latent diffusion model's pictures, finished by a GAN."
    )
    parser.add_argument("--version", action="version", version=f"diptych {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if command in (None, name):
            import_module("diptych.commands." + name.replace("-", "_")).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with `argv` (default: the process's own) and returns its exit status."""
    owns_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), "")
    args = build_parser(command).parse_args(argv)
    args.owns_process = owns_process  # and may arrange its modules as it likes
    try:
        return import_module("diptych.commands." + args.command.replace("-", "_")).run(args)
    except (KeyboardInterrupt, Cancelled):
        if args.debug:
            raise
        print("diptych: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        return _failed(error, 2, args.debug)
    except (DiptychError, OSError) as error:
        return _failed(error, 1, args.debug)


def _failed(error: Exception, status: int, debug: bool) -> int:
    if debug:
        raise error
    print("diptych:", " ".join(str(error).split()), file=sys.stderr)
    return status
