"""Schedulers by name: diffusers' class names and Automatic1111's sampler names, in one table."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """What Automatic1111 calls a sampler, as a diffusers class and settings that make it that sampler."""

    name: str
    class_name: str
    settings: dict[str, Any] = field(default_factory=dict)


# The first entry of a class without settings of its own is the name that a picture's parameters give the class.
SAMPLERS = (
    Sampler("DDIM", "DDIMScheduler"),
    Sampler("Euler", "EulerDiscreteScheduler"),
    Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    Sampler("Heun", "HeunDiscreteScheduler"),
    Sampler("LMS", "LMSDiscreteScheduler"),
    Sampler("DPM2", "KDPM2DiscreteScheduler"),
    Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    Sampler("DPM++ 2M", "DPMSolverMultistepScheduler"),
    Sampler("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Sampler("DPM++ 2S a", "DPMSolverSinglestepScheduler"),
    Sampler("DPM++ 3M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    Sampler("DEIS", "DEISMultistepScheduler"),
    Sampler("UniPC", "UniPCMultistepScheduler"),
    Sampler("PLMS", "PNDMScheduler"),
    Sampler("LCM", "LCMScheduler"),
    Sampler("DDPM", "DDPMScheduler"),
)
# Automatic1111's "Schedule type", also the last word of its older sampler names ("DPM++ 2M Karras").
SCHEDULE_TYPES: dict[str, dict[str, Any]] = {
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "Automatic": {},
    "Uniform": {},
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The scheduler called `name`, for a model whose own scheduler has `config`, and notes on what it cannot keep.

    `name` is Automatic1111's ("Euler a", "DPM++ 2M Karras") or diffusers' ("DDIMScheduler"), in any case.
    Raises ValueError for an unknown name, and for a schedule type that the sampler does not have.
    """
    sampler, schedule_type = _find(name)
    cls = getattr(importlib.import_module("diffusers"), sampler.class_name)
    settings = sampler.settings | SCHEDULE_TYPES[schedule_type]
    known = inspect.signature(cls.__init__).parameters
    lacking = [key for key in settings if key not in known]
    if lacking:
        raise ValueError(f"the sampler {sampler.name} has no schedule type {schedule_type!r}")
    # What one sampler set must not stay behind in the next: only the model's own facts are carried over.
    dropped = ("algorithm_type", "solver_order")
    carried = {k: v for k, v in config.items() if not k.startswith("use_") and k not in dropped}
    notes = []
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        notes.append(
            f"{sampler.name} knows no zero terminal SNR, with which this model was trained: expect pale pictures"
        )
    if config.get("prediction_type", "epsilon") != "epsilon" and "prediction_type" not in known:
        raise ValueError(f"{sampler.name} cannot run this model, which predicts {config['prediction_type']}")
    try:
        return _counted_from_the_start(cls.from_config(carried, **settings)), notes
    except ImportError as error:
        raise ValueError(f"{sampler.name} needs scipy, which is not installed: pip install scipy") from error


def _counted_from_the_start(scheduler: Any) -> Any:
    """The scheduler, made to take its steps by number instead of looking them up by timestep.

    With zero terminal SNR, Karras' sigmas give the same timestep several times, and the search finds the wrong one
    (an IndexError in diffusers 0.42). Pipelines that begin later set their own beginning afterwards. And a single step
    spaced as "linspace" would be the last timestep, hardly any noise, where Automatic1111 takes the first.
    """
    if hasattr(scheduler, "set_begin_index"):
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def set_timesteps_and_begin(*args: Any, **kwargs: Any) -> None:
            steps = args[0] if args else kwargs.get("num_inference_steps")
            alone = steps == 1 and scheduler.config.get("timestep_spacing") == "linspace"
            if alone:
                scheduler.register_to_config(timestep_spacing="trailing")
            try:
                set_timesteps(*args, **kwargs)
            finally:
                if alone:
                    scheduler.register_to_config(timestep_spacing="linspace")
            scheduler.set_begin_index(0)

        scheduler.set_timesteps = set_timesteps_and_begin
    return scheduler


def sampler_name(scheduler: Any) -> tuple[str, str]:
    """Automatic1111's names of a scheduler and of its schedule type; diffusers' class name where it has none."""
    config = scheduler.config
    kinds = [kind for kind in ("Karras", "Exponential") if config.get(next(iter(SCHEDULE_TYPES[kind])))]
    same = [s for s in SAMPLERS if s.class_name == type(scheduler).__name__]
    fits = [s for s in same if all(config.get(k) == v for k, v in s.settings.items())]
    best = max(fits, key=lambda s: len(s.settings), default=None)
    return best.name if best else type(scheduler).__name__, kinds[0] if kinds else "Automatic"


def _find(name: str) -> tuple[Sampler, str]:
    wanted = " ".join(name.split()).lower()
    for sampler in SAMPLERS:
        if wanted == sampler.name.lower():
            return sampler, "Automatic"
        for kind in SCHEDULE_TYPES:
            if wanted == f"{sampler.name} {kind}".lower():
                return sampler, kind
    for sampler in SAMPLERS:
        if wanted in (sampler.class_name.lower(), sampler.class_name.lower().removesuffix("scheduler")):
            return Sampler(sampler.name, sampler.class_name), "Automatic"
    import diffusers

    every = {c.lower(): c for c in dir(diffusers) if c.endswith("Scheduler")}
    if wanted in every and not hasattr(getattr(diffusers, every[wanted]), "_flow"):
        return Sampler(every[wanted], every[wanted]), "Automatic"
    known = [s.name for s in SAMPLERS] + [s.class_name for s in SAMPLERS]
    near = difflib.get_close_matches(name, known, 3, 0.5) or [s.name for s in SAMPLERS]
    raise ValueError(f"there is no scheduler called {name!r}: try {', '.join(near)}")
