r"""Automatic1111's prompt syntax, as text: what is weighted how much, at which step.

    (word)         1.1 times the attention        [word]        1 / 1.1 times
    (word:1.3)     1.3 times                      \( \) \[ \]   the signs themselves
    [from:to:0.5]  "from", after half of the      [a|b]         a and b in turns, step by step
                   steps "to"; 10 for 0.5: after  BREAK         what follows begins a new chunk
                   ten steps                      <lora:n:0.8>  the LoRA n with the weight 0.8

It knows no tokens and no models (`diptych.pipelines.encoding` does).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_LORA = re.compile(r"<lora:([^:>]+)(?::([^>]*))?>")
_TOKEN = re.compile(r"\\.|[()\[\]:|]|\bBREAK\b|[^\\()\[\]:|]+?(?=\bBREAK\b|[\\()\[\]:|]|$)|\\", re.DOTALL)
_WEIGHT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")
_EMPHASIS = 1.1
_DEEPEST = 64  # brackets within brackets


@dataclass(frozen=True)
class Fragment:
    """A piece of the prompt with one weight. A `text` of None is BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt. It may differ from step to step."""

    source: str
    loras: tuple[tuple[str, float], ...]
    _parts: tuple[_Part, ...]

    def at(self, step: int, steps: int) -> tuple[Fragment, ...]:
        """What is said at `step` (0 .. steps - 1), neighbours of one weight joined."""
        joined: list[Fragment] = []
        for fragment in _say(self._parts, 1.0, step, steps):
            last = joined[-1] if joined else None
            if last and last.text is not None and fragment.text is not None and last.weight == fragment.weight:
                joined[-1] = Fragment(last.text + fragment.text, last.weight)
            elif fragment.text != "":
                joined.append(fragment)
        return tuple(joined)


_Part = Callable[[float, int, int], Iterator[Fragment]]


def parse_prompt(source: str) -> Prompt:
    """Parses a prompt. Brackets that never close reach to the end, as in Automatic1111.

    Raises ValueError for a LoRA whose weight is no number, and for brackets that are nested too deeply.
    """
    loras = tuple((m[1].strip(), _lora_weight(m)) for m in _LORA.finditer(source))
    text = _LORA.sub("", source)
    if loras:
        text = re.sub(r" {2,}", " ", text).strip()
    return Prompt(source, loras, tuple(_Parser(text).sequence("")))


def _lora_weight(match: re.Match[str]) -> float:
    if match[2] is None:
        return 1.0
    if not _WEIGHT.fullmatch(match[2]):
        raise ValueError(f"the weight of {match[0]} is no number: write <lora:name:0.8>")
    return float(match[2])


def _say(parts: tuple[_Part, ...], weight: float, step: int, steps: int) -> Iterator[Fragment]:
    for part in parts:
        yield from part(weight, step, steps)


def _text(text: str | None) -> _Part:
    def say(weight: float, step: int, steps: int) -> Iterator[Fragment]:
        yield Fragment(text, 1.0 if text is None else weight)

    return say


def _weighted(parts: tuple[_Part, ...], factor: float) -> _Part:
    return lambda weight, step, steps: _say(parts, weight * factor, step, steps)


def _edited(before: tuple[_Part, ...], after: tuple[_Part, ...], when: str) -> _Part:
    """`when` with a point is a share of the steps, without one a number of steps."""

    def say(weight: float, step: int, steps: int) -> Iterator[Fragment]:
        turn = float(when) * steps if "." in when else int(when)
        yield from _say(before if step < turn else after, weight, step, steps)

    return say


def _in_turns(options: list[tuple[_Part, ...]]) -> _Part:
    return lambda weight, step, steps: _say(options[step % len(options)], weight, step, steps)


class _Parser:
    """Recursive descent over the signs of the syntax; everything else is text."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(text)
        self._at = self._depth = 0

    def sequence(self, stop: str) -> list[_Part]:
        """Parts up to a sign in `stop` (left standing) or the end."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"the prompt has more than {_DEEPEST} brackets within brackets")
        parts: list[_Part] = []
        while (token := self._peek()) and token not in stop:
            self._at += 1
            if token == "(":
                parts.append(self._round())
            elif token == "[":
                parts.append(self._square())
            elif token == "BREAK":
                parts.append(_text(None))
            else:
                escaped = len(token) == 2 and token[0] == "\\" and token[1] in r"\()[]"
                parts.append(_text(token[1] if escaped else token))
        self._depth -= 1
        return parts

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _round(self) -> _Part:
        inner: list[_Part] = []
        while True:
            inner += self.sequence("):")
            if self._peek() != ":":
                break
            weight = "".join(self._tokens[self._at + 1 : self._at + 2])
            if _WEIGHT.fullmatch(weight) and self._tokens[self._at + 2 : self._at + 3] == [")"]:
                self._at += 3
                return _weighted(tuple(inner), float(weight))
            inner.append(_text(":"))
            self._at += 1
        self._at += 1
        return _weighted(tuple(inner), _EMPHASIS)

    def _square(self) -> _Part:
        fields, signs = [tuple(self.sequence("]:|"))], []
        texts = [""]
        while self._peek() not in ("", "]"):
            signs.append(self._peek())
            self._at += 1
            start = self._at
            fields.append(tuple(self.sequence("]:|")))
            texts.append("".join(self._tokens[start : self._at]))
        closed = self._peek() == "]"
        self._at += 1
        if closed and signs and set(signs) == {"|"}:
            return _in_turns(fields)
        if closed and len(fields) in (2, 3) and set(signs) == {":"} and _WEIGHT.fullmatch(texts[-1]):
            before, after = (fields[0], fields[1]) if len(fields) == 3 else ((), fields[0])
            return _edited(before, after, texts[-1].strip())
        plain = list(fields[0])
        for sign, parts in zip(signs, fields[1:], strict=True):
            plain += [_text(sign), *parts]
        return _weighted(tuple(plain), 1 / _EMPHASIS)
