"""What the three trainers share: typed configuration, one random stream per step, exact resume, metrics, sheets.

A run is a folder:

    config.toml           what was asked for, copied in on the first start
    state.safetensors     everything a resumed run needs, written atomically every `save_every` steps
    metrics.csv           one row per log step
    samples/              sheets, one PNG per `sample_every` steps
    ...                   the finished model, written by the trainer

Exact resume rests on one rule: all randomness of step k is drawn from `run.rng(k)` and `run.generator(k)`, never from
global state, so weights, optimizer moments and the step number are the whole state. What a trainer does with them is
its own business: the loops stay in the trainers.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diptych.errors import CheckpointError

ConfigT = TypeVar("ConfigT")


# ------------------------------------------------------------------------------------------------ configuration


def read_config(path: str | os.PathLike[str], cls: type[ConfigT]) -> ConfigT:
    """Reads the TOML file `path` into the dataclass `cls`; nested dataclasses are TOML tables.

    Raises ValueError naming the file and the key for an unknown key, a missing one, or a value of another type.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} is not TOML: {error}.") from None
    return _build(cls, table, str(path))


def _build(cls: type[ConfigT], table: dict[str, Any], where: str) -> ConfigT:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(fields)}.")
    values = {}
    for name, value in table.items():
        values[name] = _convert(hints[name], value, f"{where}: {name}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the key {name!r} is missing.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _build(option, value, where)  # type: ignore[arg-type]
        if origin is tuple and isinstance(value, list) and (arguments[-1] is ... or len(arguments) == len(value)):
            return tuple(_convert(arguments[0], item, where) for item in value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is typing.Literal and value in arguments:
            return value
        if option in (str, int, bool) and type(value) is option:
            return value
    wanted = " or ".join(getattr(o, "__name__", None) or str(o) for o in options)
    raise ValueError(f"{where} is {value!r}, but should be {wanted}.")


# ------------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class RunConfig:
    """The part of a configuration that is the same for every trainer (the TOML table `[run]`).

    workers: processes that make training pictures ahead of the loop; 0 makes them in it.
    """

    folder: str
    steps: int
    seed: int = 0
    mixed_precision: typing.Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 500
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, not {self.workers}.")
        for name in ("steps", "log_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


class Run:
    """One training run: its folder, its accelerator, its place in time.

    config: the trainer's whole configuration, a dataclass with a field `run: RunConfig`; its other fields fix what the
    state means, so a state of another configuration is refused (only `run` may change between start and resume).
    Raises CheckpointError if the folder holds a run and `resume` is false, or holds none and `resume` is true.
    """

    def __init__(self, config: Any, resume: bool = False) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        from diptych.upscalers.device import pick_device

        self.config: RunConfig = config.run
        self.folder = Path(self.config.folder)
        self.state_file = self.folder / "state.safetensors"
        self._identity = json.dumps(
            {key: value for key, value in dataclasses.asdict(config).items() if key != "run"}
            | {"seed": self.config.seed, "mixed_precision": self.config.mixed_precision},
            sort_keys=True,
        )
        if resume and not self.state_file.is_file():
            raise CheckpointError(f"{self.folder} holds no state to resume from; start without --resume.")
        if not resume and self.state_file.exists():
            raise CheckpointError(
                f"{self.folder} already holds a run; continue it with --resume or name another folder."
            )
        if resume:
            self._check_identity()
        self.resume = resume
        AcceleratorState._reset_state()  # else the first run of a process fixes the precision of all later ones
        # Told that there is no accelerator: else several processes of torchrun on CPUs would not know of each other.
        self.accelerator = Accelerator(mixed_precision=self.config.mixed_precision, cpu=pick_device().type == "cpu")
        self.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self.start = 0
        self._objects: dict[str, Any] = {}
        self._log: dict[str, list[float]] = {}
        if self.is_main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)

    def keep_config(self, path: str | os.PathLike[str]) -> None:
        """Copies the configuration file into the run's folder."""
        if self.is_main:
            shutil.copyfile(path, self.folder / "config.toml")

    def rng(self, step: int) -> np.random.Generator:
        """The random stream of `step` for what numpy draws (the data), its own for each process."""
        return _stream(self.config.seed, step, self.accelerator.process_index)

    def ahead(self, draw: Callable[[np.random.Generator], Any], steps: range) -> Iterator[Any]:
        """`draw(self.rng(step))` for each of `steps`, arrays as tensors, made ahead of use by the run's workers."""
        from torch.utils.data import DataLoader

        draws = _Draws(draw, self.config.seed, self.accelerator.process_index, steps)
        return iter(DataLoader(draws, batch_size=None, num_workers=self.config.workers))

    def generator(self, step: int) -> torch.Generator:
        """The random stream of `step` for what torch draws (noise, latents), on the CPU."""
        seed = np.random.SeedSequence([self.config.seed, step, self.accelerator.process_index, 1])
        return torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))

    def attach(self, **objects: Any) -> None:
        """Names what has `state_dict` and `load_state_dict` and belongs to the state; loads it when resuming."""
        self._objects = objects
        if self.resume:
            tree, self.start = read_state(self.state_file)
            for name, thing in objects.items():
                thing.load_state_dict(tree[name])
            self._trim_metrics()

    def steps(self) -> Iterator[int]:
        """The steps still to be done, with a progress bar; saves the state after every `save_every` and at the end."""
        from tqdm import tqdm

        total = self.config.steps
        with tqdm(total=total, initial=self.start, disable=not self.is_main, unit="step", mininterval=2) as bar:
            for step in range(self.start, total):
                yield step
                if self.due(step, self.config.log_every):
                    self._flush(step)
                bar.update()
                if (step + 1) % self.config.save_every == 0 or step + 1 == total:
                    self._save(step + 1)

    @property
    def memory_format(self) -> torch.memory_format:
        """How to lay out a convolutional network for training on this device.

        Channels-last, except in bf16 on a CPU, where the backward of GroupNorm is many times slower in it.
        """
        half_on_cpu = self.device.type == "cpu" and self.config.mixed_precision != "no"
        return torch.contiguous_format if half_on_cpu else torch.channels_last

    def lay_out(self, *modules: torch.nn.Module) -> None:
        """Brings the weights of `modules` into `memory_format`."""
        for module in modules:
            module.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def set_learning_rate(
        self, step: int, peak: float, warmup: int, *optimizers: Any, steps: int | None = None
    ) -> None:
        """A linear rise over `warmup` steps, then half a cosine down to a hundredth at the end of `steps`."""
        rise = min(1.0, (step + 1) / max(1, warmup))
        fall = 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * step / (steps or self.config.steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rise * float(fall)

    def due(self, step: int, every: int) -> bool:
        """Whether `step` is the last of a block of `every` steps, or of the run."""
        return (step + 1) % every == 0 or step + 1 == self.config.steps

    def log(self, **values: torch.Tensor | float) -> None:
        """Collects values; every `log_every` steps their means over steps and processes become a row of metrics.csv."""
        for name, value in values.items():
            self._log.setdefault(name, []).append(float(torch.as_tensor(value).detach()))

    def _flush(self, step: int) -> None:
        names = list(self._log)
        means = torch.tensor([np.mean(self._log[name]) for name in names], device=self.device)
        means = self.accelerator.reduce(means, "mean")
        self._log = {}
        if self.is_main and names:
            self._write_row({"step": step + 1} | {n: f"{m:.6g}" for n, m in zip(names, means.tolist(), strict=True)})

    def sheet(self, step: int, rows: Sequence[Sequence[torch.Tensor]], captions: Sequence[str] = ()) -> None:
        """Writes samples/STEP.png, a `sheet` of pictures (3, H, W) in 0..1."""
        if self.is_main:
            sheet(rows, captions).save(self.folder / "samples" / f"{step + 1:07d}.png")

    def _write_row(self, row: dict[str, Any]) -> None:
        path = self.folder / "metrics.csv"
        old: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                fields = list(reader.fieldnames or [])
                if set(row) - set(fields):  # a validation column that appears later: rewrite with it
                    old = list(reader)
        else:
            fields = []
        if set(row) - set(fields):
            fields += [name for name in row if name not in fields]
            self._write_table(path, fields, [*old, row])
        else:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, fields).writerow(row)

    @staticmethod
    def _write_table(path: Path, fields: list[str], rows: list[dict[str, Any]]) -> None:
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, path)

    def _trim_metrics(self) -> None:
        path = self.folder / "metrics.csv"
        if self.is_main and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if int(row["step"]) <= self.start]
                fields = list(reader.fieldnames or [])
            self._write_table(path, fields, rows)

    def _save(self, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if self.is_main:
            tree = {name: thing.state_dict() for name, thing in self._objects.items()}
            write_state(self.state_file, tree, step, self._identity)

    def _check_identity(self) -> None:
        theirs, ours = json.loads(_metadata(self.state_file)["identity"]), json.loads(self._identity)
        for key in sorted(set(theirs) | set(ours)):
            if theirs.get(key) != ours.get(key):
                raise CheckpointError(
                    f"{self.state_file} belongs to another configuration: {key} is {theirs.get(key)!r} there and "
                    f"{ours.get(key)!r} here."
                )


def _stream(seed: int, step: int, process: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, process])


class _Draws(torch.utils.data.Dataset[Any]):
    """What each step of a run draws, for a loader whose processes know no Run."""

    def __init__(self, draw: Callable[[np.random.Generator], Any], seed: int, process: int, steps: range) -> None:
        self.draw, self.seed, self.process, self.steps = draw, seed, process, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Any:
        return self.draw(_stream(self.seed, self.steps[index], self.process))


# ------------------------------------------------------------------------------------------------ state on disk


def write_state(path: Path, tree: Any, step: int, identity: str) -> None:
    """Writes a tree of dicts, lists, numbers, strings and tensors as one safetensors file, atomically; no pickle."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def encode(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[f"{len(tensors)}"] = node.detach().to("cpu", copy=True).contiguous()
            return {"tensor": len(tensors) - 1}
        if isinstance(node, dict):
            return {"dict": [[key, encode(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {"list": [encode(value) for value in node]}
        return {"value": node}

    skeleton = json.dumps(encode(tree))
    part = path.with_suffix(".part")
    save_file(tensors, part, {"tree": skeleton, "step": str(step), "identity": identity})
    os.replace(part, path)


def read_state(path: Path) -> tuple[Any, int]:
    """Reads what `write_state` wrote: the tree and the step. Raises CheckpointError for a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    metadata = _metadata(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None

    def decode(node: dict[str, Any]) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[str(value)]
        if kind == "dict":
            return {key: decode(item) for key, item in value}
        if kind == "list":
            return [decode(item) for item in value]
        return value

    return decode(json.loads(metadata["tree"])), int(metadata["step"])


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not {"tree", "step", "identity"} <= set(metadata):
        raise CheckpointError(f"{path} is not the state of a training run.")
    return metadata


# ------------------------------------------------------------------------------------------------ averages, sheets


def ema_of(model: torch.nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """An exponential moving average of `model`; call `.update_parameters(model)` after each step.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that early averages are not mostly initial weights.
    """

    def update(averages: Any, currents: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(list(averages), list(currents), 1 - min(decay, (1 + n) / (10 + n)))

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=update)


def sheet(rows: Sequence[Sequence[torch.Tensor]], captions: Sequence[str] = ()) -> Image.Image:
    """Pictures (3, H, W) in 0..1 in rows of equal cells (the largest picture's size), white between them.

    captions: one for each picture in reading order, wrapped below it. Pictures of less than 128 pixels are enlarged by
    a whole number, so that a person sees something.
    """
    height = max(picture.shape[-2] for row in rows for picture in row)
    width = max(picture.shape[-1] for row in rows for picture in row)
    zoom = max(1, 128 // max(width, height))
    font = ImageFont.load_default()
    labels = [textwrap.wrap(caption, width * zoom // 6) for caption in captions]
    line = 12
    label = line * max(map(len, labels), default=0)
    across, down = width * zoom + 6, height * zoom + label + 6
    page = Image.new("RGB", (max(map(len, rows)) * across, len(rows) * down), "white")
    draw = ImageDraw.Draw(page)
    texts = iter(labels)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            left, top = j * across + 3, i * down + 3
            levels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            image = Image.fromarray(levels)
            page.paste(image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST), (left, top))
            for k, text in enumerate(next(texts, ())):
                draw.text((left, top + height * zoom + k * line), text, fill="black", font=font)
    return page
