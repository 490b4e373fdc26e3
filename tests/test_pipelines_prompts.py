"""Automatic1111's prompt syntax."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.pipelines.prompts import parse_prompt


def said(prompt: str, step: int = 0, steps: int = 10) -> list[tuple[str | None, float]]:
    return [(f.text, round(f.weight, 4)) for f in parse_prompt(prompt).at(step, steps)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple", [("a red apple", 1)]),
        ("(apple)", [("apple", 1.1)]),
        ("((apple))", [("apple", 1.21)]),
        ("[apple]", [("apple", 0.9091)]),
        ("a (red:1.5) apple", [("a ", 1), ("red", 1.5), (" apple", 1)]),
        ("(a (red:2) apple:0.5)", [("a ", 0.5), ("red", 1), (" apple", 0.5)]),
        ("(a: b)", [("a: b", 1.1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:-1)", [("a", -1)]),
        (r"\(apple\) \[x\]", [("(apple) [x]", 1)]),
        (r"a\b", [(r"a\b", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("stray) bracket]", [("stray) bracket]", 1)]),
        ("[never closed", [("never closed", 0.9091)]),
        ("ratio 1:2", [("ratio 1:2", 1)]),
        ("a BREAK b", [("a ", 1), (None, 1), (" b", 1)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
        ("", []),
        ("()", []),
        ("[a:b]", [("a:b", 0.9091)]),
    ],
)
def test_a_prompt_means_what_it_means_in_automatic1111(prompt: str, expected: list[tuple[str | None, float]]) -> None:
    assert said(prompt) == expected


def test_an_edit_changes_after_a_share_of_the_steps() -> None:
    texts = [said("[cat:dog:0.4]", step)[0][0] for step in range(10)]
    assert texts == ["cat"] * 4 + ["dog"] * 6


def test_an_edit_with_a_whole_number_changes_after_that_many_steps() -> None:
    assert [said("a [cat:dog:7]", step) for step in (6, 7)] == [[("a cat", 1)], [("a dog", 1)]]


def test_an_edit_with_one_text_adds_it_and_with_an_empty_second_removes_it() -> None:
    assert [said("[cat:0.5]", step) for step in (4, 5)] == [[], [("cat", 1)]]
    assert [said("[cat::0.5]", step) for step in (4, 5)] == [[("cat", 1)], []]


def test_edits_and_weights_nest() -> None:
    assert said("([a:(b:2):0.5]:1.5)", 9) == [("b", 3)]
    assert [said("[[a:b:2]:c:5]", step)[0][0] for step in (0, 3, 6)] == ["a", "b", "c"]


def test_alternatives_take_turns() -> None:
    assert [said("[a|b|c] x", step)[0][0] for step in range(4)] == ["a x", "b x", "c x", "a x"]


def test_loras_are_taken_out_of_the_text() -> None:
    prompt = parse_prompt("a cat <lora:style:0.8> in <lora:other> rain")
    assert prompt.loras == (("style", 0.8), ("other", 1.0))
    assert [f.text for f in prompt.at(0, 1)] == ["a cat in rain"]


def test_a_lora_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of <lora:style:much> is no number"):
        parse_prompt("<lora:style:much>")


def test_brackets_without_end_are_refused_and_do_not_crash() -> None:
    with pytest.raises(ValueError, match="brackets within brackets"):
        parse_prompt("(" * 5000)


@given(st.text(alphabet="ab:|[]()\\. 12BREAK", max_size=30), st.integers(0, 9))
def test_every_text_is_a_prompt_and_loses_no_letter_outside_of_edits(text: str, step: int) -> None:
    fragments = parse_prompt(text).at(step, 10)
    assert all(math.isfinite(f.weight) for f in fragments)
    if "[" not in text and "BREAK" not in text and "\\" not in text:
        assert "".join(f.text or "" for f in fragments).count("a") == text.count("a")
