"""Checkpoint files as data: `.safetensors`, `.pth`, `.pt` and `.ckpt`, told apart by what is in them, not by name.

Tensors are views of the mapped file, so that a file of many gigabytes costs memory only where it is looked at. No code
in a file ever runs (`diptych.upscalers.unpickle`), on any version of torch; `torch.load` is not used at all. Which
network the weights belong to is decided in `diptych.upscalers.networks`.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diptych.errors import CheckpointError, DiptychError, ModelNotFound, UnknownArchitecture

from .networks import Network, load_network
from .unpickle import Inert, storage_dtype, unpickle

PathLike = str | os.PathLike[str]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: PathLike) -> Any:
    """Everything in a checkpoint file: dicts, lists, tuples, strings, numbers, tensors and `Inert` objects.

    The tensors share the file's pages, privately: writing to one does not change the file, but replacing the file's
    contents in place changes them. Raises CheckpointError when the file is not a checkpoint, damaged, or holds code.
    """
    with _about(path):
        return _read(Path(path))


def read_state_dict(path: PathLike) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint file by name, without the wrappings that trainers put around them.

    Unwraps `params_ema`, `params`, `state_dict` and their like, and the prefix `module.` of data-parallel training.
    Raises CheckpointError as `read_checkpoint` does, and when there are no weights.
    """
    with _about(path):
        return _state_dict(_read(Path(path)))


def load_network_file(path: PathLike) -> Network:
    """The network in a checkpoint file, in fp32, in memory of its own.

    Raises CheckpointError as `read_state_dict` does, and UnknownArchitecture when no known network fits.
    """
    with _about(path):
        state_dict = _state_dict(_read(Path(path)))
        for keys, what in _STRANGERS:
            if any(key.startswith(keys) for key in state_dict):
                raise UnknownArchitecture(what)
        return load_network(state_dict)


def blend_denoise(
    general: Mapping[str, torch.Tensor], wdn: Mapping[str, torch.Tensor], denoise: float
) -> dict[str, torch.Tensor]:
    """Weights between `general` (denoise 1: noise is removed) and `wdn` (denoise 0: noise is kept).

    Real-ESRGAN's deep network interpolation: every weight is `denoise * general + (1 - denoise) * wdn`. Raises
    ValueError for a `denoise` outside 0..1, CheckpointError when the two are not the same network.
    """
    if not 0 <= denoise <= 1:
        raise ValueError(f"denoise is {denoise}, and must be between 0 (keep noise) and 1 (remove it)")
    if general.keys() != wdn.keys() or any(general[key].shape != wdn[key].shape for key in general):
        raise CheckpointError("the general and the wdn weights are not of the same network and cannot be blended")
    return {key: torch.lerp(wdn[key].float(), general[key].float(), float(denoise)) for key in general}


_STRANGERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."),
        "a Stable Diffusion checkpoint, not an upscaler: use it with `diptych generate --model FILE`",
    ),
    (("lora_unet_", "lora_te"), "a LoRA for Stable Diffusion, not an upscaler: use it with `generate --lora FILE`"),
    (
        ("encoder.down.", "decoder.up.", "encoder.down_blocks.", "decoder.up_blocks."),
        "the autoencoder of a diffusion model, not an upscaler: it belongs into the `vae` folder of a model",
    ),
    (("down_blocks.", "up_blocks."), "the UNet of a diffusion model, not an upscaler: it belongs into a `unet` folder"),
    (("control_model.", "controlnet_"), "a ControlNet for Stable Diffusion, not an upscaler"),
    (("text_model.", "text_encoder."), "a text encoder, not an upscaler"),
)
"""What people pick by mistake: prefixes of keys, and what to tell them."""


@contextmanager
def _about(path: PathLike) -> Iterator[None]:
    """Puts the file's name in front of every message, and one sentence in place of a parser's own exceptions."""
    try:
        yield
    except DiptychError as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error
    except FileNotFoundError as error:
        raise ModelNotFound(f"{os.fspath(path)}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise CheckpointError(f"{os.fspath(path)}: it does not fit into memory") from error
    except (
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError, AssertionError,
        Warning, zipfile.BadZipFile, zipfile.LargeZipFile, SafetensorError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{os.fspath(path)}: damaged or cut short ({_line(error)}): get it again") from error


def _line(error: Exception) -> str:
    """A parser's own words, which can have several lines."""
    return " ".join(str(error).split())[:200]


def _read(path: Path) -> Any:
    if path.is_dir():
        raise CheckpointError("a folder: name a file in it")
    with open(path, "rb") as file:
        head = file.read(1024)
        if head[8:9] == b"{" and b"\0" in head[:8]:  # a length of eight bytes, then JSON
            return _read_safetensors(path)
        if head[:4] == b"PK\x03\x04":
            return _read_zip(path, _map(file))
        if head[:1] == b"\x80":
            return _read_legacy(_map(file))
    raise CheckpointError(_stranger(head))


def _stranger(head: bytes) -> str:
    """What a file that begins with `head` is, if it is no checkpoint."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty: the download failed, get the file again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights: the download failed, get the file again with a direct link"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves: run `git lfs pull` where it came from"
    if head[257:262] == b"ustar":
        return "a tar archive, the format of torch before 0.1.10: save it again with a later torch"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")):
        return "a picture, not weights"
    if head.startswith((b"GGUF", b"\x08")):
        return "a model in the format of another program (GGUF or ONNX): get the .safetensors or .pth file"
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "a text file, not weights"
    return "no checkpoint that can be read here: give a .safetensors file or one that torch.save wrote"


def _map(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(os.fspath(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dictionary)


def _read_zip(path: Path, mapped: mmap.mmap) -> Any:
    """torch.save since 1.6: a zip archive, stored without compression, one entry for the pickle and one per storage."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError("a zip archive, but none that torch.save wrote")
    folder = pickles[0][: -len("data.pkl")]
    if folder + "constants.pkl" in entries:
        raise CheckpointError("a TorchScript program, not weights: get the .safetensors or .pth file")
    if any(entry.compress_type or entry.flag_bits & 1 for entry in entries.values()):
        raise CheckpointError("a zip archive packed by another program: unpack it, torch.save does not compress")
    if sum(entry.file_size for entry in entries.values()) > len(mapped):
        raise ValueError("entries that overlap")

    def extent(name: str) -> tuple[int, int]:
        entry = entries[name]
        local = mapped[entry.header_offset : entry.header_offset + 30]
        lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")  # name, extra field
        start = entry.header_offset + 30 + sum(lengths)
        if local[:4] != b"PK\x03\x04" or start + entry.file_size > len(mapped):
            raise ValueError(f"the entry {name!r}")
        return start, entry.file_size

    if folder + "byteorder" in entries:
        start, size = extent(folder + "byteorder")
        _refuse_big_endian(mapped[start : start + size] != b"little")

    storages: dict[str, torch.Tensor] = {}

    def storage(identifier: Any) -> torch.Tensor:
        kind, storage_type, key, _, count = identifier
        if kind != "storage" or not isinstance(key, str) or type(count) is not int:
            raise TypeError("a reference to something that is no storage")
        dtype = storage_dtype(storage_type)
        if key not in storages:
            start, size = extent(f"{folder}data/{key}")
            storages[key] = _bytes_at(mapped, start, size)
        if count < 0 or count * dtype.itemsize > storages[key].numel():
            raise ValueError(f"the size of storage {key!r}")
        return storages[key][: count * dtype.itemsize].view(dtype)

    mapped.seek(extent(pickles[0])[0])
    return unpickle(mapped, storage)


def _bytes_at(mapped: mmap.mmap, start: int, size: int) -> torch.Tensor:
    """`size` bytes of the file from `start`: a view, or a copy where they are not aligned for every element type."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    view = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start)
    return view.clone() if start % 16 else view


def _read_legacy(mapped: mmap.mmap) -> Any:
    """torch.save before 1.6: five pickles (magic number, version, system, object, storage keys), then the storages."""
    if unpickle(mapped) != _LEGACY_MAGIC:
        raise CheckpointError("a Python pickle that torch.save did not write: save the weights with torch.save")
    unpickle(mapped)
    system = unpickle(mapped)
    _refuse_big_endian(isinstance(system, dict) and system.get("little_endian") is False)
    storages: dict[str, torch.Tensor] = {}
    room = len(mapped)

    def storage(identifier: Any) -> Any:
        nonlocal room
        if identifier[0] == "module":  # a layer together with its source code
            return identifier[1]
        kind, storage_type, key, _, count, *view = identifier
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
            raise TypeError("a reference to something that is no storage")
        dtype = storage_dtype(storage_type)
        if key not in storages:
            room -= count * dtype.itemsize
            if room < 0:
                raise ValueError("storages larger than the file")
            storages[key] = torch.empty(count, dtype=dtype)  # its bytes come after the pickles
        if view and view[0] is not None:
            _, offset, size = view[0]
            return torch.narrow(storages[key], 0, offset, size)
        return storages[key]

    tree = unpickle(mapped, storage)
    for key in unpickle(mapped):
        target = storages.pop(key)
        size = target.numel() * target.element_size()
        if int.from_bytes(mapped.read(8), "little") != target.numel() or mapped.tell() + size > len(mapped):
            raise ValueError(f"the size of storage {key!r}")
        if size:
            target.view(torch.uint8).copy_(_bytes_at(mapped, mapped.tell(), size))
            mapped.seek(size, os.SEEK_CUR)
    if storages:
        raise ValueError(f"no data for storage {min(storages)!r}")
    return tree


def _refuse_big_endian(big: bool) -> None:
    if big:
        raise CheckpointError("written on a big-endian machine, which cannot be read here: save it again elsewhere")


def _state_dict(tree: Any) -> dict[str, torch.Tensor]:
    for _ in range(4):  # wrappings can be nested, and a damaged file can contain itself
        wrapped = tree if isinstance(tree, dict) else {}
        tree = next((wrapped[key] for key in _WRAPPERS if isinstance(wrapped.get(key), dict)), tree)
    if isinstance(tree, Inert):
        raise CheckpointError(f"a whole pickled object ({tree.name}), not weights: save its state_dict() instead")
    items = tree.items() if isinstance(tree, dict) else ()
    weights = {key: value for key, value in items if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not weights:
        raise CheckpointError("there are no weights in it")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key[len(prefix) :]: value for key, value in weights.items()}
    return weights
