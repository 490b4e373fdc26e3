"""The figures of the embedded model, on compositions and photographs that its training never saw.

    python benchmarks/embedded_model.py [--model FOLDER] [--prompts 200] [--json FILE] [--sheet FILE]

Needs the glyph font (Debian: fonts-noto-color-emoji) and scikit-image; the rows on photographs also need those of
`diptych/data/photos.py` (--photos FOLDER). Each identification row stands beside what the same measure says of true
composites and of pictures with the captions of others, so that the measure can be judged too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage.color import rgb2lab
from torch.nn import functional

from diptych import metrics
from diptych.data import glyphs, matching, photos
from diptych.data.glyphs import COLOURS, Composition
from diptych.data.sources import GlyphSource
from diptych.pipelines import DiptychPipeline
from diptych.training import sheet
from diptych.upscalers import Upscaler
from diptych.upscalers.degradations import degrade
from diptych.upscalers.official import embedded_model
from diptych.vae.train import as_tensor

SEED = 20_000  # of the test prompts; the training's own draws have other streams and the other split


def draw(pipeline: DiptychPipeline, prompts: Sequence[str], guidance: float) -> list[np.ndarray]:
    """One native picture a prompt, seeds 0, 1, ..., uint8 (H, H, 3)."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), 8):
        part = list(prompts[start : start + 8])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        out = pipeline(part, num_inference_steps=25, guidance_scale=guidance, generator=generators, upscale=1)
        pictures += [np.asarray(image) for image in out.images]
        print(f"\r{len(pictures)} of {len(prompts)} pictures", end="", file=sys.stderr)
    print(file=sys.stderr)
    return pictures


def named_share(pictures: Sequence[np.ndarray], asked: Sequence[Composition], font: Sequence[str]) -> float:
    """Share of pictures whose nearest glyph of the whole font is the one asked for."""
    hits = [
        matching.best_matches(picture, composition.background, font)[0].glyph.subject == composition.glyphs[0].subject
        for picture, composition in zip(pictures, asked, strict=True)
    ]
    return sum(hits) / len(hits)


def both_share(pictures: Sequence[np.ndarray], asked: Sequence[Composition], font: Sequence[str]) -> float:
    """Share of pictures in which the two glyphs asked for are the two that are found."""
    hits = [
        sorted(match.glyph.subject for match in matching.two_matches(picture, composition.background, font))
        == sorted(placed.subject for placed in composition.glyphs)
        for picture, composition in zip(pictures, asked, strict=True)
    ]
    return sum(hits) / len(hits)


def sharpness(pictures: Sequence[np.ndarray], asked: Sequence[Composition]) -> float:
    """Median gradient energy of pictures against that of the composite they are nearest to, drawn at their size."""
    ratios = []
    for picture, composition in zip(pictures, asked, strict=True):
        subject = composition.glyphs[0].subject
        place = matching.best_matches(picture, composition.background, [subject])[0].glyph
        true = glyphs.render(Composition((place,), composition.background, ""), len(picture))
        ratios.append(matching.gradient_energy(picture) / matching.gradient_energy(true))
    return statistics.median(ratios)


def colour_difference(pictures: Sequence[np.ndarray], asked: Sequence[Composition]) -> float:
    """Median over pictures with a plain background of dE76 between the colour asked for and the picture's rim."""
    differences = []
    for picture, composition in zip(pictures, asked, strict=True):
        if composition.background.kind != "plain":
            continue
        rim = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, 0], picture[:, -1]])
        want = np.uint8(COLOURS[composition.background.colours[0]])
        have = np.median(rim, axis=0).astype(np.uint8)
        differences.append(float(np.linalg.norm(rgb2lab(want[None, None]) - rgb2lab(have[None, None]))))
    return statistics.median(differences)


@torch.no_grad()
def vae_psnr(vae: torch.nn.Module, compositions: Sequence[Composition], side: int) -> float:
    """Mean PSNR inside the boxes of the glyphs, of unseen compositions sent through the autoencoder."""
    values = []
    for start in range(0, len(compositions), 32):
        part = compositions[start : start + 32]
        true = as_tensor(glyphs.render_batch(part, side))
        back = vae.decode(vae.encode(true).latent_dist.mean).sample
        true, back = ((x.float() + 1).div(2).clamp(0, 1) for x in (true, back))
        for i, composition in enumerate(part):
            for placed in composition.glyphs:
                left, top, size = (round(v * side) for v in (placed.left, placed.top, placed.size))
                box = (slice(i, i + 1), slice(None), slice(top, top + size), slice(left, left + size))
                values.append(metrics.psnr(true[box], back[box]).item())
    return statistics.fmean(values)


def restored(upscaler: Upscaler, large: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, H, W) in 0..1 degraded, then enlarged by the upscaler and by Lanczos."""
    small = degrade(large, torch.Generator().manual_seed(seed), upscaler.scale)
    ours, lanczos = [], []
    for picture in small:
        image = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
        ours.append(as_picture(upscaler.upscale(image)))
        lanczos.append(as_picture(image.resize((large.shape[3], large.shape[2]), Image.Resampling.LANCZOS)))
    return torch.stack(ours), torch.stack(lanczos)


def as_picture(image: Image.Image | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def gain(ours: torch.Tensor, lanczos: torch.Tensor, true: torch.Tensor) -> float:
    """Mean PSNR of `ours` less that of `lanczos`, dB."""
    return float((metrics.psnr(ours, true) - metrics.psnr(lanczos, true)).mean())


def crops(folder: str, rng: np.random.Generator, count: int, held_out: bool) -> torch.Tensor:
    """Crops of 256 pixels of the photographs that training saw, or of those it did not: (count, 3, 256, 256)."""
    paths = [path for photo, path in photos.find_photos(folder).items() if photo.held_out == held_out]
    source = photos.CropSource(photos.large_enough(paths, 256), longest=1440)
    return torch.from_numpy(source.batch(rng, count, 256)).permute(0, 3, 1, 2).float() / 255


def comparison(upscaler: Upscaler) -> Image.Image:
    """Two unseen photographs: degraded, enlarged by Lanczos, by the upscaler, and as they were."""
    rows = []
    for photo in photos.PHOTOS:
        path = photos.locate(photo) if photo.package == photos.SKIMAGE and photo.held_out else None
        if path is not None:
            true = as_picture(ImageOps.fit(Image.open(path), (256, 256)))[None]
            ours, lanczos = restored(upscaler, true, SEED)
            small = degrade(true, torch.Generator().manual_seed(SEED), upscaler.scale)
            rows.append([functional.interpolate(small, size=256)[0], lanczos[0], ours[0], true[0]])
    return sheet(rows, ["degraded", "Lanczos", "diptych", "true"] * len(rows))


def finish(upscaler: Upscaler, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(upscaler.upscale(Image.fromarray(picture))) for picture in pictures]


def warm_seconds(pipeline: DiptychPipeline, guidance: float) -> float:
    """Median seconds of a whole 25-step picture, upscaled, once everything is loaded."""
    times = []
    for seed in range(4):
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        pipeline("a red apple", num_inference_steps=25, guidance_scale=guidance, generator=generator)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--photos", help="folder of the held-out photographs")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--sheet", help="write the first 16 pictures of one glyph and of two here, finished, halved")
    parser.add_argument("--compare", help="write two photographs before and after the upscaler here, and stop")
    args = parser.parse_args()

    upscaler = Upscaler.from_pretrained(Path(args.model) / "upscaler", dtype="fp32")
    if args.compare:
        comparison(upscaler).save(args.compare)
        return
    pipeline = DiptychPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    subjects = json.loads((Path(args.model) / "words.json").read_text())["subjects"]
    font = glyphs.all_subjects()
    rng = np.random.default_rng(SEED)
    single = GlyphSource(tuple(subjects), (1, 0, 0), test_split=True).compositions(rng, args.prompts)
    double = GlyphSource(tuple(subjects), (0, 1, 0), test_split=True).compositions(rng, max(1, args.prompts // 2))
    mixed = GlyphSource(tuple(subjects), test_split=True).compositions(rng, args.prompts)
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    made = draw(pipeline, [composition.caption for composition in single], args.guidance)
    made_double = draw(pipeline, [composition.caption for composition in double], args.guidance)
    true = [glyphs.render(composition, side) for composition in single]
    blurred = [np.asarray(Image.fromarray(t).resize((side // 2,) * 2, 4).resize((side,) * 2, 2)) for t in true]
    finished = finish(upscaler, made)

    figures: dict[str, float] = {}

    def row(name: str, value: Callable[[], float], form: str = "{:.2f}") -> None:
        figures[name] = value()
        print(f"{name:<78} {form.format(figures[name])}", flush=True)

    row("subjects", lambda: len(subjects), "{:.0f}")
    row("VAE PSNR inside glyph boxes, unseen compositions, dB", lambda: vae_psnr(pipeline.vae, mixed, side))
    share = "{:.1%}"
    row("single glyph: the named one is nearest of the font", lambda: named_share(made, single, font), share)
    row("  the same of true composites", lambda: named_share(true, single, font), share)
    row("  the same with the captions of others", lambda: named_share(made, single[1:] + single[:1], font), share)
    row("two glyphs, both found", lambda: both_share(made_double, double, font), share)
    true_double = [glyphs.render(composition, side) for composition in double]
    row("  the same of true composites of two", lambda: both_share(true_double, double, font), share)
    row("gradient energy of the native picture against the true composite", lambda: sharpness(made, single))
    row("gradient energy of the finished picture against the true composite", lambda: sharpness(finished, single))
    row("  the same of true composites blurred to half resolution", lambda: sharpness(blurred, single))
    row("background, median dE76", lambda: colour_difference(made, single), "{:.1f}")
    large = torch.stack([as_picture(glyphs.render(composition, 256)) for composition in mixed[:48]])
    ours, lanczos = restored(upscaler, large, SEED)
    row("upscaler on unseen degraded glyphs, PSNR against Lanczos, dB", lambda: gain(ours, lanczos, large), "{:+.2f}")
    if args.photos:
        seen, unseen = (crops(args.photos, rng, count, held_out) for count, held_out in ((200, False), (48, True)))
        ours_p, lanczos_p = restored(upscaler, unseen, SEED + 1)
        row("the same on photographs, dB", lambda: gain(ours_p, lanczos_p, unseen), "{:+.2f}")
        niqe = metrics.Naturalness(seen)
        row(
            "  NIQE (natural: the photographs of the training set) against Lanczos",
            lambda: niqe.distance(ours_p) - niqe.distance(lanczos_p),
            "{:+.2f}",
        )
        row(
            "  NIQE of the photographs themselves against Lanczos",
            lambda: niqe.distance(unseen) - niqe.distance(lanczos_p),
            "{:+.2f}",
        )
    row("final picture, px", lambda: side * upscaler.scale, "{:.0f}")
    row("25-step picture, warm, seconds", lambda: warm_seconds(pipeline, args.guidance))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    if args.sheet:
        first = finished[:16] + finish(upscaler, made_double[:16])
        cells = [as_picture(Image.fromarray(picture).reduce(2)) for picture in first]
        rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
        sheet(rows, [composition.caption for composition in single[:16] + double[:16]]).save(args.sheet)


if __name__ == "__main__":
    main()
