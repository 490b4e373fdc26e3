"""Glyph compositions: deterministic, captioned truthfully, split for good; and the measure that recognises them."""

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.data import glyphs, matching
from diptych.data.sources import DataConfig, GlyphSource
from diptych.errors import ModelNotFound

SUBJECTS = ("red apple", "rocket", "violin", "cat face", "banana", "octopus", "umbrella", "teapot")
LIST = Path(__file__).parent.parent / "models/recipes/subjects.txt"


def font_or_skip() -> None:
    try:
        glyphs.font_file()
    except ModelNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def source() -> GlyphSource:
    font_or_skip()
    return GlyphSource(SUBJECTS)


def test_the_same_stream_gives_the_same_pictures_and_captions(source: GlyphSource) -> None:
    first, second = (source.batch(np.random.default_rng(3), 16, 64) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]
    other = source.batch(np.random.default_rng(4), 16, 64)
    assert first[1] != other[1]


def test_training_and_test_pair_no_subjects_with_the_same_background(source: GlyphSource) -> None:
    def pairs(split: GlyphSource) -> set[tuple]:
        compositions = split.compositions(np.random.default_rng(1), 500)
        return {(tuple(sorted(g.subject for g in c.glyphs)), c.background.words()) for c in compositions}

    assert not pairs(source) & pairs(source.held_out())


def test_captions_say_what_is_in_the_picture(source: GlyphSource) -> None:
    names = source.vocabulary
    known = set(source.words()["words"])
    for composition in source.compositions(np.random.default_rng(0), 400):
        said = composition.caption
        for colour in composition.background.colours:
            assert colour in said
        for placed in composition.glyphs:
            nouns = [form for name in names[placed.subject] for form in (name, glyphs.plural(name))]
            assert any(noun in said for noun in nouns), said
        singular = {word for word in said.replace(",", "").split()}
        plurals = {glyphs.plural(name).split()[-1] for options in names.values() for name in options}
        assert singular <= known | plurals, said


@pytest.mark.parametrize("grid", [0, 8, 16, 32])
@pytest.mark.parametrize("sizes", [(0.55, 0.95), (0.875, 0.875)])
def test_glyphs_lie_inside_the_picture_on_the_grid_and_do_not_cover_each_other(
    source: GlyphSource, grid: int, sizes: tuple[float, float]
) -> None:
    for composition in replace(source, sizes=sizes, grid=grid).compositions(np.random.default_rng(2), 300):
        boxes = [(g.left, g.top, g.left + g.size, g.top + g.size) for g in composition.glyphs]
        for box in boxes:
            assert min(box[:2]) >= 0 and max(box[2:]) <= 1 + 1e-9
            assert box[2] > box[0] and all(v * grid == round(v * grid) for v in box)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[2] <= b[0] + 1e-9 or b[2] <= a[0] + 1e-9 or a[3] <= b[1] + 1e-9 or b[3] <= a[1] + 1e-9


@pytest.mark.parametrize("wrong", [{"grid": -1}, {"spread": 1.5}, {"spread": -0.1}])
def test_a_grid_or_spread_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="grid must be at least 0 and spread from 0 to 1"):
        DataConfig(subjects=str(LIST), **wrong).open()


@pytest.mark.parametrize("grid", [0, 16])
def test_without_spread_glyphs_stand_in_a_row_each_in_the_middle_of_its_cell(source: GlyphSource, grid: int) -> None:
    for composition in replace(source, grid=grid, spread=0.0).compositions(np.random.default_rng(5), 200):
        number = len(composition.glyphs)
        for index, g in enumerate(composition.glyphs):
            assert abs(g.left + g.size / 2 - (index + 0.5) / number) <= (1 / grid if grid else 1e-9)
            assert abs(g.top + g.size / 2 - 0.5) <= (1 / grid if grid else 1e-9)


def test_a_picture_is_its_background_where_no_glyph_is(source: GlyphSource) -> None:
    for composition in source.compositions(np.random.default_rng(6), 50):
        picture, ground = glyphs.render(composition, 64), glyphs.paint(composition.background, 64)
        outside = np.ones((64, 64), bool)
        for g in composition.glyphs:
            left, top, size = (int(np.floor(v * 64)) for v in (g.left, g.top, g.size))
            outside[max(0, top - 1) : top + size + 3, max(0, left - 1) : left + size + 3] = False
        assert np.array_equal(picture[outside], ground[outside])
        assert not np.array_equal(picture, ground)


def test_synonyms_name_one_subject_only() -> None:
    font_or_skip()
    words = [word for names in glyphs.vocabulary(SUBJECTS).values() for word in names]
    assert len(words) == len(set(words))
    assert "cat" in glyphs.vocabulary(SUBJECTS)["cat face"]


def test_the_embedded_models_subjects_are_in_the_font() -> None:
    font_or_skip()
    subjects = glyphs.read_subjects(LIST)
    assert len(subjects) >= 400 and len(set(subjects)) == len(subjects)
    assert set(subjects) <= set(glyphs.all_subjects())
    assert all(unicodedata.lookup(subject) for subject in subjects)


def test_unknown_subjects_and_a_missing_font_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("red apple\nno such thing\n")
    monkeypatch.setenv("DIPTYCH_GLYPH_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(ModelNotFound, match="fonts-noto-color-emoji"):
        glyphs.font_file()
    monkeypatch.undo()
    font_or_skip()
    with pytest.raises(ValueError, match="'no such thing' is not the name"):
        DataConfig(subjects=str(tmp_path / "list.txt")).open()
    with pytest.raises(ValueError, match="cannot be read"):
        DataConfig(subjects=str(tmp_path / "missing.txt")).open()


@pytest.fixture
def compositions(source: GlyphSource) -> list[glyphs.Composition]:
    return GlyphSource(SUBJECTS, (1, 0, 0), True).compositions(np.random.default_rng(9), 20)


def test_the_measure_names_true_composites_and_not_the_captions_of_others(
    compositions: list[glyphs.Composition],
) -> None:
    named = others = 0
    for composition, other in zip(compositions, compositions[1:] + compositions[:1], strict=True):
        picture = glyphs.render(composition, 64)
        named += matching.best_matches(picture, composition.background, SUBJECTS)[0].glyph.subject == (
            composition.glyphs[0].subject
        )
        others += matching.best_matches(picture, other.background, SUBJECTS)[0].glyph.subject == (
            other.glyphs[0].subject
        )
    assert named >= 0.95 * len(compositions)
    assert others <= 0.4 * len(compositions), "one in eight is chance"


def test_the_measure_finds_both_of_two_glyphs(source: GlyphSource) -> None:
    doubles = GlyphSource(SUBJECTS, (0, 1, 0), True).compositions(np.random.default_rng(9), 10)
    for composition in doubles:
        found = matching.two_matches(glyphs.render(composition, 64), composition.background, SUBJECTS)
        assert {match.glyph.subject for match in found} == {placed.subject for placed in composition.glyphs}


def test_blurring_loses_gradient_energy(compositions: list[glyphs.Composition]) -> None:
    for composition in compositions[:10]:
        sharp = glyphs.render(composition, 64)
        half = Image.fromarray(sharp).resize((32, 32), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BILINEAR)
        assert matching.gradient_energy(np.asarray(half)) < 0.7 * matching.gradient_energy(sharp)


def test_the_error_of_a_match_is_the_squared_distance_to_its_composite(source: GlyphSource) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (matching.SIDE, matching.SIDE, 3), dtype=np.uint8)
    background = glyphs.Background("gradient", ("navy", "gold"))
    for match in matching.best_matches(picture, background, SUBJECTS[:3]):
        drawn = glyphs.render(glyphs.Composition((match.glyph,), background, ""), matching.SIDE)
        distance = ((picture / 255.0 - drawn / 255.0) ** 2).sum()
        assert abs(match.error - distance) < 0.01 * distance
