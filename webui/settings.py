"""What a server is told when it starts: where it listens, who may use it, what it may spend.

Only values; nothing here reads the environment or the command line.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. A request over a limit is answered with a 4xx that states the limit."""

    body_bytes: int = 64 * MIB  # of one HTTP request, as sent
    json_values: int = 100_000  # in one request: numbers, strings, lists and objects
    upload_seconds: float = 300  # from the first to the last byte of a request
    picture_pixels: int = 40_000_000  # of one picture that is sent in
    request_pixels: int = 100_000_000  # of all pictures that one request sends in
    output_pixels: int = 120_000_000  # of one picture that comes out, after upscaling
    size: int = 2048  # of either side that is denoised
    steps: int = 150
    pictures: int = 16  # of one request, all batches together
    prompt_characters: int = 10_000
    waiting_jobs: int = 100  # of all clients together
    waiting_jobs_per_client: int = 10


@dataclass(frozen=True)
class Settings:
    """One server. `users` maps names to passwords; empty means that nobody is asked."""

    host: str = "127.0.0.1"
    port: int = 7860
    users: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    outputs: Path = Path("outputs")
    page: bool = True
    memory_bytes: int | None = None  # for loaded models; None: half of what the machine has
    cors_origins: tuple[str, ...] = ()
    limits: Limits = Limits()

    @property
    def local_only(self) -> bool:
        """Whether only programs on this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def separate_owners(self) -> bool:
        """Whether pictures belong to one client each; on a machine of one's own they belong to the machine."""
        return bool(self.users) or not self.local_only
