"""Which models there are, and which are loaded: pipelines and upscalers within a budget of memory.

Clients name models; only names on the list are taken, so that no path reaches the file system. Loading happens in the
queue's thread, one at a time; what was used longest ago goes first when memory is short.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from PIL import Image

from diptych.errors import DiptychError, ModelNotFound
from diptych.upscalers.official import OFFICIAL, cache_folder, cached_files, embedded_model
from diptych.webui.settings import Settings

if TYPE_CHECKING:
    from diptych.webui.backend import Upscaling

log = logging.getLogger(__name__)

_EMBEDDED, EMBEDDED_UPSCALER = "diptych-glyphs", "Diptych"  # the model that comes along, and its upscaler
_BACKGROUNDS = ("sky blue", "yellow", "pink", "white")  # of the prompts that are offered
_RESAMPLING = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion model: a folder in diffusers' format, a single file, or an id that was given at the start."""

    name: str
    source: str

    @property
    def path(self) -> Path | None:
        """Where it lies, if it lies on this machine."""
        path = Path(self.source)
        return path if path.exists() else None


@dataclass(frozen=True)
class UpscalerChoice:
    """A way to enlarge; `source` None: by resampling, without a network."""

    name: str
    source: Path | None
    scale: float | None


class ModelStore:
    """The models of one server."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.budget = settings.memory_bytes or _machine_memory() // 2
        self._loaded: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()  # the longest unused first
        self._own: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of each pipeline, the upscaler it came with
        self._lock = threading.Lock()
        self.current = self.checkpoints()[0]

    def checkpoints(self) -> list[Checkpoint]:
        """What can be drawn with, the default first. Raises ModelNotFound if there is nothing at all."""
        found: dict[str, Checkpoint] = {}
        sources = [self.settings.model] if self.settings.model else []
        try:
            sources.append(str(embedded_model()))
        except ModelNotFound:
            if not sources:
                raise
        folder = models_folder()
        if folder.is_dir():
            sources += [str(path) for path in sorted(folder.iterdir()) if _is_model(path)]
        for source in sources:
            name = Path(source).name if Path(source).exists() else source
            found.setdefault(name, Checkpoint(name, source))
        return list(found.values())

    def checkpoint(self, name: str | None) -> Checkpoint:
        """The model with this name, as on the list; None: the current one. Raises ModelNotFound with the list."""
        if name is None:
            return self.current
        there = self.checkpoints()
        for item in there:
            if name in (item.name, Path(item.name).stem):
                return item
        names = ", ".join(item.name for item in there)
        raise ModelNotFound(f"there is no model called {name[:100]!r}: choose one of {names}")

    def upscalers(self) -> list[UpscalerChoice]:
        """What can enlarge now: the models' own networks, official ones, files in the folder, and resampling."""
        choices = [UpscalerChoice(name, folder, None) for name, folder in self._models_own_upscalers()]
        choices += [
            UpscalerChoice(name, cache_folder() / entry.filename, entry.scale)
            for name, entry in OFFICIAL.items()
            if (cache_folder() / entry.filename).is_file()
        ]
        choices += [UpscalerChoice(name, path, None) for name, path in cached_files().items()]
        return choices + [UpscalerChoice(name, None, None) for name in _RESAMPLING]

    def check_upscaler(self, name: str) -> UpscalerChoice:
        """The upscaler with this name. Raises ModelNotFound with the list."""
        there = self.upscalers()
        for item in there:
            if item.name.lower() == name.lower():
                return item
        names = ", ".join(item.name for item in there)
        raise ModelNotFound(f"there is no upscaler called {name[:100]!r}: choose one of {names}")

    def downloadable(self) -> list[str]:
        """The official upscalers that are not there yet."""
        return [name for name, entry in OFFICIAL.items() if not (cache_folder() / entry.filename).is_file()]

    def samplers(self) -> list[str]:
        """Automatic1111's names of the schedulers there are."""
        from diptych.pipelines.schedulers import SAMPLERS

        return [sampler.name for sampler in SAMPLERS]

    def pipeline(self, checkpoint: Checkpoint, upscaler: str | None = None) -> Any:
        """The loaded pipeline, with its own upscaler or the one that is named."""
        from diptych.pipelines.loading import load_pipeline

        def load() -> Any:
            return load_pipeline(checkpoint.source, device=self.settings.device, dtype=self.settings.dtype)

        pipeline = self._get(("model", checkpoint.name), load, _disk_size(checkpoint.path))
        own = self._own.setdefault(pipeline, pipeline.upscaler)
        wanted = own if upscaler is None else self._component(self.check_upscaler(upscaler), pipeline)
        if pipeline.upscaler is not wanted:
            pipeline.register_modules(upscaler=wanted)
        return pipeline

    def enlarge(
        self, name: str, picture: Image.Image, how: Upscaling, progress: Callable[[int, int], None], cancel: Any
    ) -> Image.Image:
        """One picture through one upscaler."""
        from diptych.upscalers import Upscaler

        choice, scale = self.check_upscaler(name), how.scale_for(picture.size)
        if choice.source is None:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            return picture.resize(size, _RESAMPLING[choice.name])
        source, denoise = choice.source, how.denoise

        def load() -> Any:
            return Upscaler.from_pretrained(
                source, device=self.settings.device, dtype=self.settings.dtype, denoise=denoise
            )

        kind = "upscaler" if denoise is None else f"upscaler, denoise {denoise:g}"
        upscaler = self._get((kind, choice.name), load, _disk_size(source))
        tile = "auto" if how.tile is None else how.tile
        return upscaler.upscale(picture, scale, tile=tile, border=how.border, progress=progress, cancel=cancel)

    def is_loaded(self, checkpoint: Checkpoint) -> bool:
        """Whether the next job with this model need not load it."""
        return ("model", checkpoint.name) in self._loaded

    def loaded(self) -> dict[str, int]:
        """What is in memory, with its bytes."""
        with self._lock:
            return {f"{kind} {name}": size for (kind, name), (_, size) in self._loaded.items()}

    def words(self) -> list[str]:
        """What the current model can be asked for, to pick from; empty if it does not say."""
        vocabulary = _vocabulary(self.current.path)
        return sorted(str(word) for word in vocabulary.get("subjects") or vocabulary.get("words", []))

    def examples(self) -> list[str]:
        """Prompts in the current model's own words: its subjects, in the colours it knows; empty if it names none."""
        vocabulary = _vocabulary(self.current.path)
        subjects, known = sorted(map(str, vocabulary.get("subjects", []))), set(vocabulary.get("words", []))
        if not subjects or not {"a", "on", "background"} <= known:
            return subjects[:4]
        backgrounds = [colour for colour in _BACKGROUNDS if set(colour.split()) <= known]
        chosen = subjects[:: max(1, len(subjects) // 4)][:4]
        return [
            f"{'an' if subject[0] in 'aeiou' and 'an' in known else 'a'} {subject} on a {background} background"
            for subject, background in zip(chosen, backgrounds, strict=False)
        ]

    def unknown_words(self, prompt: str) -> list[str]:
        """Sentences on the words that the current model never saw; none if it does not say, or is not loaded yet."""
        from diptych.pipelines.generation import unknown_words

        with self._lock:
            loaded = self._loaded.get(("model", self.current.name))
        return unknown_words(loaded[0], prompt) if loaded else []

    def _models_own_upscalers(self) -> Iterator[tuple[str, Path]]:
        for item in self.checkpoints():
            folder = Path(item.source) / "upscaler"
            if (folder / "config.json").is_file():
                yield (EMBEDDED_UPSCALER if item.name == _EMBEDDED else item.name), folder

    def _component(self, choice: UpscalerChoice, pipeline: Any) -> Any:
        from diptych.pipelines.upscaler import DiptychUpscaler

        source = choice.source
        if source is None:
            raise ValueError(f"{choice.name} cannot work inside a model: choose a network, or enlarge afterwards")

        def load() -> Any:
            component = (
                DiptychUpscaler.from_pretrained(source) if source.is_dir() else DiptychUpscaler.from_name(source)
            )
            return component.to(pipeline.device, pipeline.dtype)

        return self._get(("component", choice.name), load, _disk_size(source))

    def _get(self, key: tuple[str, str], load: Callable[[], Any], expected: int) -> Any:
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
                return self._loaded[key][0]
        self._make_room(expected)
        value = load()
        with self._lock:
            self._loaded[key] = (value, _memory_of(value))
        self._make_room(0, keep=key)
        return value

    def _make_room(self, needed: int, keep: tuple[str, str] | None = None) -> None:
        """Forgets what was used longest ago until `needed` more bytes fit into the budget."""
        with self._lock:
            for key in list(self._loaded):
                if sum(size for _, size in self._loaded.values()) + needed <= self.budget:
                    return
                if key != keep:
                    log.info("%s %s is forgotten: over the budget of %d bytes", *key, self.budget)
                    del self._loaded[key]


def models_folder() -> Path:
    """Where a user puts models: `models/` in `$DIPTYCH_HOME`, or in `~/.cache/diptych`. It need not exist."""
    return cache_folder().parent / "models"


def _is_model(path: Path) -> bool:
    return (path / "model_index.json").is_file() or path.suffix in (".safetensors", ".ckpt")


@lru_cache(maxsize=4)
def _vocabulary(folder: Path | None) -> dict[str, Any]:
    """The model's `words.json`; empty if it has none."""
    path = folder / "words.json" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiptychError(f"{path} cannot be read ({error}): remove it or put it right") from error
    return words if isinstance(words, dict) else {}


def _disk_size(path: Path | None) -> int:
    """The bytes of the weights in a file or folder: about what they take in memory."""
    if path is None:
        return 0
    files = [path] if path.is_file() else [file for file in path.rglob("*.safetensors") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _memory_of(value: Any) -> int:
    """The bytes of all parameters and buffers of a pipeline, a module or an upscaler."""
    import torch

    if isinstance(value, torch.nn.Module):
        modules = [value]
    else:
        parts = getattr(value, "components", None) or vars(value)
        modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        modules += [
            part.module for part in parts.values() if isinstance(getattr(part, "module", None), torch.nn.Module)
        ]
    return sum(tensor.nbytes for module in modules for tensor in [*module.parameters(), *module.buffers()])


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not Linux
        return 8 * 2**30
