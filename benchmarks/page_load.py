"""How long the page takes to be usable in Chromium after the server is ready; and the pictures of docs/images.

    python benchmarks/page_load.py [--repeats 3] [--model DIR] [--shots docs/images]

Starts a server of its own (the embedded model unless told otherwise) and measures, each time in a new browser with an
empty cache, from asking for the page until the prompt can be typed into. Prints wall time, and the CPU time that the
browser and the server spent on it, which means something on a busy machine too. With --shots it then draws, enlarges
and browses, and writes what the screen shows into that folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
# For networks where nothing but loopback is reachable: the browser must not wait for its own services.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PATIENCE = 600_000  # milliseconds


@contextmanager
def server(model: str | None) -> Iterator[tuple[str, int]]:
    """A server of its own; its address and its process number."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-u", "-m", "diptych", "ui", "--port", "0", "-o", outputs]
        command += ["--model", model] if model else []
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            found = next((match for line in process.stderr or () if (match := re.search(r"http://\S+", line))), None)
            if found is None:
                raise SystemExit("the server did not start")
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def browser(scheme: str = "light") -> Iterator[tuple[Any, Path]]:
    """A new browser with an empty cache, and the folder that its processes are known by."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("there is no Chromium on this system: install it")
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile,
            executable_path=path,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
            color_scheme=scheme,
        )
        context.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        yield context, Path(profile)
        context.close()


def cpu_seconds(pid: int) -> float:
    """What a process has spent so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def browser_seconds(profile: Path) -> float:
    """What all processes of a browser have spent so far."""
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(profile) in (process / "cmdline").read_text():
                total += cpu_seconds(int(process.name))
        except OSError:
            pass  # it ended meanwhile
    return total


def load(url: str, pid: int) -> dict[str, float]:
    """One visit: seconds until the prompt can be typed into, and the CPU seconds of both sides."""
    with browser() as (context, profile):
        page = context.pages[0]
        page.goto("about:blank")
        before, served, began = browser_seconds(profile), cpu_seconds(pid), time.monotonic()
        page.goto(url, wait_until="commit")
        page.locator("#prompt textarea").fill("a red apple")
        return {
            "wall": time.monotonic() - began,
            "browser CPU": browser_seconds(profile) - before,
            "server CPU": cpu_seconds(pid) - served,
        }


def shoot(url: str, folder: Path) -> None:
    """The pictures that docs/ shows: Create, Upscale and Library, as they look in use."""
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as (context, _):
        page = context.pages[0]
        page.goto(url)
        draw(page)
        snap(page, folder / "page-create.png")
        page.locator("#send-upscale").click()
        expect(page.locator("#upscale-pictures img").first).to_be_visible()
        page.locator("#upscale-run").click()
        expect(page.locator("#upscale-status")).to_contain_text("Done")
        expect(page.locator("#upscale-slider img")).to_have_count(2)
        snap(page, folder / "page-upscale.png")
        page.get_by_role("tab", name="Library").click()
        page.locator("#library-pictures img").first.click()
        expect(page.locator("#library-picture img")).to_be_visible()
        snap(page, folder / "page-library.png")


def draw(page: Page) -> None:
    """Four pictures."""
    page.locator("#prompt textarea").fill("a bell on a dark blue background")
    for name, value in (("count", "4"), ("seed", "1")):
        field = page.locator(f"#{name} input[type=number]").first
        field.fill(value)
        field.blur()
    page.locator("#generate").click()
    expect(page.locator("#create-status")).to_contain_text("Done")
    expect(page.locator("#create-results img").nth(3)).to_be_visible()


def snap(page: Page, path: Path) -> None:
    """What the screen shows, once its pictures are there."""
    page.wait_for_function("[...document.images].every(image => image.complete)")
    page.evaluate("window.scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--shots", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    with server(args.model) as (url, pid):
        visits = [load(url, pid) for _ in range(args.repeats)]
        if visits:
            print(f"from asking to a prompt that can be typed into, {len(visits)} new browsers:")
            for name in visits[0]:
                values = [visit[name] for visit in visits]
                print(f"  {name:12} first {values[0]:6.2f} s, median {statistics.median(values):6.2f} s")
        if args.shots:
            shoot(url, args.shots)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
