"""Where the work runs and in which precision: the one place that decides it, by what the machine has.

Nothing here knows networks or pictures.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

import torch

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device to work on; None and "auto" mean the first there is of cuda, mps, cpu.

    Raises ValueError for a device that is unknown to torch or absent from this machine.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"there is no device called {device!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if picked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (picked.index or 0) >= count:
            have = f"it has {count} CUDA device{'s' * (count != 1)}" if count else "it has no CUDA device"
            raise ValueError(f"this machine cannot give {picked}: {have} that this torch can use; try --device auto")
    elif picked.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("this machine cannot give mps: it has no Metal device that torch can use; try --device auto")
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision to compute in; None and "auto" mean the fastest one that is safe on `device`.

    That is fp16 on cuda, bf16 on a cpu that computes in it, else fp32. A name is "fp32", "fp16", "bf16" or torch's own.
    Raises ValueError for an unknown name, and for fp16 on a cpu, which torch does not compute at any useful speed.
    """
    if dtype is None or dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    picked = _DTYPES.get(dtype.removeprefix("torch.").lower()) if isinstance(dtype, str) else dtype
    if picked is None or picked not in _DTYPES.values():
        raise ValueError(f"there is no dtype called {dtype!r} here: use auto, fp32, fp16 or bf16")
    if picked is torch.float16 and device.type == "cpu":
        raise ValueError("fp16 is for GPUs: on a cpu use bf16, fp32 or auto")
    return picked


def fast_bf16(device: torch.device) -> bool:
    """Whether convolutions in bf16 are faster than in fp32 on `device`.

    On a cpu: it has AMX or avx512_bf16, and ONEDNN_MAX_CPU_ISA does not forbid oneDNN to use them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bf16() and _onednn_may_use_bf16()


def use_allowed_cores() -> None:
    """Gives torch as many threads as this process may use cores; torch sees neither a container's share nor its limit.

    For programs of their own: inside of somebody else's process the number of threads is theirs to choose.
    """
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no such share: "max", or not Linux
        pass
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(max(round(cores), 1), torch.get_num_threads()))


@lru_cache(maxsize=1)
def _cpu_has_bf16() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
        return bool(flags & {"amx_bf16", "avx512_bf16"})
    except OSError:  # not Linux: torch knows on its own, from 2.5 on
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        return any(check() for check in checks if check is not None)


def _onednn_may_use_bf16() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    limit = limit.upper()
    return torch.backends.mkldnn.is_available() and (
        limit in ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16") or "AMX" in limit or "AVX10" in limit
    )


def tile_pixels(device: torch.device, bytes_per_pixel: int = 6144) -> int:
    """How many input pixels one call of a network should get, halos included.

    bytes_per_pixel: what the network holds at its widest, for each of them; the default is twice what an RRDBNet of 64
    features does in fp32, for networks of which nothing is known. On a cpu a tile may take half a gigabyte, on a GPU
    half of what is free; beyond the limits given here larger tiles gain nothing: their halos are a small part already.
    """
    if device.type == "cuda":
        return max(min(torch.cuda.mem_get_info(device)[0] // 2 // bytes_per_pixel, 1 << 20), 1 << 12)
    return max(min((1 << 29) // bytes_per_pixel, 1 << 18), 1 << 12)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, numpy or Python raised `error` because memory ran out, on whatever device and torch."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):  # torch.OutOfMemoryError, by its older name
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text)
