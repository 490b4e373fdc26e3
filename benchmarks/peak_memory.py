"""The most memory that a process has held. This is no program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def peak_bytes(device: Any = None) -> int:
    """Bytes: of a CUDA device what torch held at most, else this process's resident memory at its highest."""
    if getattr(device, "type", None) == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage's maximum: on Linux a child begins with that of the process that started it
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
