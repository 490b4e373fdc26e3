"""The `parameters` text of a picture, as Automatic1111 writes and reads it.

    a red apple
    Negative prompt: blurry
    Steps: 25, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512

The first lines are the prompt, the last is a list of settings; a value that would break the list is quoted as JSON.
This module knows the text alone: what the settings mean to a pipeline is decided elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NEGATIVE = "Negative prompt:"
# Automatic1111's form cannot hold every prompt (one with a line "Steps: 1, ..." at its end). Then ours says it again.
_EXACT = "Diptych prompts"
_NAME = r"[^\W_][\w \-/.]*"
_SETTING = re.compile(rf'\s*({_NAME}):\s*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')
_FEWEST = 3  # settings in a line, below which Automatic1111 takes it for a line of the prompt


@dataclass(frozen=True)
class Infotext:
    """Prompts, and settings by Automatic1111's names ("Steps", "CFG scale", "Seed", ...), all as text."""

    prompt: str
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def format_infotext(info: Infotext) -> str:
    """The text. `parse_infotext` gives back the same prompts and settings, however odd they are.

    Raises ValueError for a setting whose name is no plain words.
    """
    text = _plain(info.prompt, info.negative_prompt, info.settings)
    try:
        if parse_infotext(text) == info:
            return text
    except ValueError:
        pass
    exact = json.dumps([info.prompt, info.negative_prompt], ensure_ascii=True)
    return _plain(info.prompt, info.negative_prompt, {**info.settings, _EXACT: exact})


def parse_infotext(text: str) -> Infotext:
    """Reads the text of `format_infotext` and of Automatic1111, Forge and other programs that write its form.

    Raises ValueError when there is no list of settings in it, or one that breaks off inside a quoted value.
    """
    lines = text.strip().splitlines() or [""]
    settings = _settings(lines[-1])
    if settings is None:
        raise ValueError(
            'this is no `parameters` text: its last line should be a list like "Steps: 20, Sampler: Euler a, Seed: 1"'
        )
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines[:-1]:
        if negative is None and line.strip().startswith(_NEGATIVE):
            negative, line = [], line.strip().removeprefix(_NEGATIVE)
        (prompt if negative is None else negative).append(line)
    info = Infotext("\n".join(prompt).strip(), "\n".join(negative or []).strip(), settings)
    if _EXACT not in settings:
        return info
    return _exact(settings)


def _exact(settings: dict[str, str]) -> Infotext:
    rest = {key: value for key, value in settings.items() if key != _EXACT}
    try:
        prompt, negative = json.loads(settings[_EXACT])
    except ValueError as error:
        raise ValueError(f"the setting {_EXACT!r} of the `parameters` text is damaged") from error
    return Infotext(str(prompt), str(negative), rest)


def _plain(prompt: str, negative_prompt: str, settings: Mapping[str, str]) -> str:
    lines = [prompt] if prompt else []
    if negative_prompt:
        lines.append(f"{_NEGATIVE} {negative_prompt}")
    for name in settings:
        if not re.fullmatch(_NAME, name) or name != name.strip():
            raise ValueError(f"{name!r} cannot be the name of a setting: use letters, digits, spaces and - / .")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    plain = value == value.strip() and value.isprintable() and not any(c in value for c in ',:"\\')
    return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())


def _settings(line: str) -> dict[str, str] | None:
    """The settings of a line that consists of nothing else, or None."""
    found: dict[str, str] = {}
    at = 0
    while at < len(line):
        match = _SETTING.match(line, at)
        if match is None:
            return None
        name, value = match.groups()
        found[name] = _unquoted(value)
        at = match.end()
    return found if len(found) >= _FEWEST or "Steps" in found or _EXACT in found else None


def _unquoted(value: str) -> str:
    value = value.strip()
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError as error:
        raise ValueError(f"the `parameters` text is damaged: a quoted value never ends, at {value[:40]!r}") from error
