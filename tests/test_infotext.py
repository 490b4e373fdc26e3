"""The `parameters` text of a picture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.infotext import Infotext, format_infotext, parse_infotext

texts = st.text(max_size=60)
names = st.sampled_from(["Steps", "CFG scale", "Seed", "Size", "Model", "Lora hashes", "Hires upscale", "x/y", "A-b 2"])


@given(texts, texts, st.dictionaries(names, texts))
def test_whatever_is_written_is_read_back_the_same(prompt: str, negative: str, settings: dict[str, str]) -> None:
    info = Infotext(prompt, negative, {"Steps": "20", **settings})
    assert parse_infotext(format_infotext(info)) == info


@given(texts)
def test_any_text_at_all_is_either_read_or_refused_with_a_sentence(text: str) -> None:
    try:
        assert isinstance(parse_infotext(text), Infotext)
    except ValueError as error:
        assert "parameters" in str(error)


def test_a_picture_of_automatic1111_with_all_its_quirks_is_read() -> None:
    text = (
        "masterpiece, (best quality:1.2),\n<lora:add detail:0.8> girl: standing\n"
        "Negative prompt: lowres, bad: anatomy,\nblurry\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 3034842164, Size: 512x768, Model hash: 6ce0161689,"
        " Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, Hires upscale: 2,"
        ' Hires upscaler: "R-ESRGAN 4x+", Lora hashes: "add detail: 7c6bad76eb54",'
        ' TI hashes: "easynegative: c74b4e810b03, bad: 1a", Version: v1.6.0'
    )
    info = parse_infotext(text)
    assert info.prompt == "masterpiece, (best quality:1.2),\n<lora:add detail:0.8> girl: standing"
    assert info.negative_prompt == "lowres, bad: anatomy,\nblurry"
    assert info.settings["Sampler"] == "DPM++ 2M Karras"
    assert info.settings["Hires upscaler"] == "R-ESRGAN 4x+"
    assert info.settings["TI hashes"] == "easynegative: c74b4e810b03, bad: 1a"
    assert info.settings["Version"] == "v1.6.0"


def test_a_text_without_a_negative_prompt_is_read() -> None:
    assert parse_infotext("a cat\nSteps: 20, Sampler: Euler, Seed: 1") == Infotext(
        "a cat", "", {"Steps": "20", "Sampler": "Euler", "Seed": "1"}
    )


def test_a_text_of_settings_alone_has_an_empty_prompt() -> None:
    assert parse_infotext("Steps: 20, Sampler: Euler, Seed: 1").prompt == ""


def test_windows_line_ends_are_read() -> None:
    assert parse_infotext("a\r\nNegative prompt: b\r\nSteps: 1, Seed: 2, Size: 8x8").negative_prompt == "b"


def test_simple_settings_are_written_as_automatic1111_writes_them() -> None:
    info = Infotext("a cat", "dog", {"Steps": "20", "Sampler": "Euler a", "Model": "odd, name: 1"})
    assert format_infotext(info) == 'a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Model: "odd, name: 1"'


@pytest.mark.parametrize(
    "text", ["", "  \n ", "hello there", "a cat\nNegative prompt: dog", "a, b, c: d\nSteps are good"]
)
def test_a_text_without_settings_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no `parameters` text"):
        parse_infotext(text)


def test_a_text_that_breaks_off_in_a_quoted_value_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged"):
        parse_infotext('a cat\nSteps: 20, Seed: 1, Model: "odd, na')


def test_a_setting_whose_name_would_not_be_read_back_is_refused() -> None:
    with pytest.raises(ValueError, match="name of a setting"):
        format_infotext(Infotext("a", "", {"a:b": "1"}))
