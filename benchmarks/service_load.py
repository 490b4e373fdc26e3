"""Load test of the /sdapi/v1 service: many clients, mixed calls, cancels and hang-ups, on loopback. Stops by itself.

    python benchmarks/service_load.py [--clients 50] [--seconds 120] [--model DIR]

Starts a server of its own in another process (the embedded model unless told otherwise), lets the clients work, and
checks: every answer belongs to its request (by seed and prompt; a seed gives the same picture each time, and no other
seed gives it), none is lost, nobody is shown another's job, and resident memory grows less than 5 % after warm-up.
Prints a table; exit status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CALLS = {"txt2img": 6, "img2img": 2, "extras": 2, "progress": 6, "lists": 2, "cancel": 1, "hang up": 1, "refused": 1}
GROWTH = 0.05  # of resident memory, allowed after warm-up
WARM_UP = 0.4  # share of the time


@dataclass
class Tally:
    """What happened."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    pictures: dict[int, str] = field(default_factory=dict)  # seed -> digest of the picture
    seeds: dict[str, int] = field(default_factory=dict)  # and back
    memory: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes)


class Client:
    """One program that uses the service, one call after the other."""

    def __init__(self, number: int, url: str, tally: Tally) -> None:
        self.name, self.tally, self.chance = f"client {number}", tally, random.Random(number)
        self.number = number
        self.http = httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(300), headers={"X-Client-Id": self.name}, trust_env=False
        )

    async def work(self, until: float) -> None:
        async with self.http:
            while time.monotonic() < until:
                (kind,) = self.chance.choices(list(CALLS), list(CALLS.values()))
                try:
                    await getattr(self, "do_" + kind.replace(" ", "_"))()
                    self.tally.done[kind] += 1
                except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
                    self.tally.wrong.append(f"{self.name}: {kind}: {type(error).__name__} {error}"[:300])
                await asyncio.sleep(self.chance.uniform(0, 0.2))

    async def do_txt2img(self) -> None:
        seed, steps = self.number * 1000 + self.chance.randrange(5), 2  # its own, and few, so that they come again
        began = time.monotonic()
        answer = await self.post("txt2img", self.wish(seed, steps))
        self.tally.waits.append(time.monotonic() - began)
        self.check(answer, seed)
        pixels = Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).tobytes()
        digest = hashlib.sha256(pixels).hexdigest()
        assert self.tally.pictures.setdefault(seed, digest) == digest, f"seed {seed} gave two different pictures"
        assert self.tally.seeds.setdefault(digest, seed) == seed, f"seed {seed} gave the picture of another seed"

    async def do_img2img(self) -> None:
        seed = self.chance.randrange(2**32)
        body = self.wish(seed, 4) | {"init_images": [picture(self.number)], "denoising_strength": 0.5}
        self.check(await self.post("img2img", body), seed)

    async def do_extras(self) -> None:
        size = self.chance.randrange(4, 40)
        body = {"image": picture(self.number, size), "upscaler_1": "Lanczos", "upscaling_resize": 2}
        answer = await self.post("extra-single-image", body)
        result = Image.open(io.BytesIO(base64.b64decode(answer["image"]))).convert("RGB")
        assert result.size == (2 * size, 2 * size), "an enlarged picture of another size"
        assert result.getpixel((size, size)) == colour(self.number), "another client's picture"

    async def do_progress(self) -> None:
        answer = await self.http.get("/sdapi/v1/progress")
        answer.raise_for_status()
        assert answer.json()["state"]["job_count"] == 0, "another client's job is shown"

    async def do_lists(self) -> None:
        route = self.chance.choice(["sd-models", "samplers", "upscalers", "options", "memory"])
        assert (await self.http.get("/sdapi/v1/" + route)).json()

    async def do_cancel(self) -> None:
        seed = self.chance.randrange(2**32 - 2)
        task = f"{self.name} {seed}"
        body = self.wish(seed, 30) | {"n_iter": 2, "force_task_id": task}
        drawing = asyncio.create_task(self.post("txt2img", body))
        await asyncio.sleep(self.chance.uniform(0, 0.5))
        await self.http.post("/sdapi/v1/interrupt", params={"id_task": task})
        answer = await drawing
        seeds = json.loads(answer["info"])["all_seeds"]
        assert seeds in ([], [seed], [seed, seed + 1]) and len(answer["images"]) == len(seeds)

    async def do_hang_up(self) -> None:
        try:
            await self.post("txt2img", self.wish(1, 30), timeout=self.chance.uniform(0.05, 0.5))
        except httpx.TimeoutException:
            pass

    async def do_refused(self) -> None:
        body = self.wish(1, 10_000)
        assert (await self.http.post("/sdapi/v1/txt2img", json=body)).status_code == 422

    def wish(self, seed: int, steps: int) -> dict[str, Any]:
        return {"prompt": f"a red apple {self.name}", "seed": seed, "steps": steps, "width": 64, "height": 64}

    async def post(self, route: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
        while True:
            answer = await self.http.post("/sdapi/v1/" + route, json=body, **options)
            if answer.status_code != 429:
                break
            self.tally.done["told to wait"] += 1
            await asyncio.sleep(0.5)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text[:200]}"
        return answer.json()

    def check(self, answer: dict[str, Any], seed: int) -> None:
        info = json.loads(answer["info"])
        assert info["all_seeds"] == [seed], f"asked for seed {seed}, got {info['all_seeds']}"
        assert info["prompt"].endswith(self.name), f"got the answer to {info['prompt']!r}"
        assert len(answer["images"]) == 1, "no picture"


def colour(number: int) -> tuple[int, int, int]:
    """Each client's own."""
    return number * 5 % 256, number * 17 % 256, number * 29 % 256


def picture(number: int, size: int = 32) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour(number)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def resident(pid: int) -> int:
    """Bytes of memory a process holds (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


async def _watch(pid: int, tally: Tally, until: float) -> None:
    while time.monotonic() < until:
        tally.memory.append((time.monotonic(), resident(pid)))
        await asyncio.sleep(1)


async def _load(url: str, pid: int, clients: int, seconds: float) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    workers = [Client(number, url, tally).work(until) for number in range(clients)]
    await asyncio.gather(_watch(pid, tally, until), *workers)
    return tally


def growth(memory: list[tuple[float, int]]) -> float:
    """How much the median of the last quarter is over the median of the quarter after warm-up, as a share."""
    after = [size for _, size in memory[int(len(memory) * WARM_UP) :]]
    quarter = max(1, len(after) // 4)
    first, last = (sorted(part)[len(part) // 2] for part in (after[:quarter], after[-quarter:]))
    return last / first - 1


def run(url: str, pid: int, clients: int, seconds: float) -> Tally:
    """Puts the load on a running server, for that long and no longer than its last answers take."""
    return asyncio.run(_load(url, pid, clients, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-u", "-m", "diptych", "ui", "--api-only", "--port", "0", "-o", outputs]
        command += ["--model", args.model] if args.model else []
        server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            url = None
            for line in server.stderr or ():
                if found := re.search(r"http://\S+", line):
                    url = found[0]
                    break
            if url is None:
                print("the server did not start", file=sys.stderr)
                return 1
            tally = run(url, server.pid, args.clients, args.seconds)
        finally:
            server.terminate()
            server.wait(30)
    waits = sorted(tally.waits) or [0.0]
    grown = growth(tally.memory)
    print(f"{args.clients} clients, {args.seconds:g} s")
    for kind, count in sorted(tally.done.items()):
        print(f"  {kind:14} {count:7}")
    print(f"txt2img, asked to answered: median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.2f} s")
    print(f"resident memory at the end: {tally.memory[-1][1] / 2**20:.0f} MiB, {100 * grown:+.1f} % since warm-up")
    print(f"answers that were wrong or lost: {len(tally.wrong)}")
    for text in tally.wrong[:10]:
        print("  " + text)
    return 1 if tally.wrong or grown >= GROWTH else 0


if __name__ == "__main__":
    raise SystemExit(main())
