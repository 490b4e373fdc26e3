"""Which tiles are cut: properties of the arithmetic, for any size of picture, tile and halo."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.upscalers.tiles import auto_tile, check_border, fold, round_up, span, split

lengths = st.integers(1, 1500)
multiples = st.sampled_from([1, 2, 4])
borders = st.sampled_from(["zero", "reflect", "wrap"])


@settings(deadline=None, max_examples=60)
@given(st.integers(-300, 300), lengths, st.integers(3, 700), multiples)
def test_cores_cover_every_pixel_once_and_start_at_multiples(start, length, tile, multiple):
    start = round_up(start, multiple)
    parts = split(start, start + length, tile, multiple)
    assert parts[0][0] == start and parts[-1][1] == start + length
    assert all(before[1] == after[0] for before, after in zip(parts, parts[1:], strict=False))
    assert all(first % multiple == 0 and 0 < stop - first <= max(tile, multiple) for first, stop in parts)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(3, 700), st.integers(0, 400), multiples, borders)
def test_every_core_reads_its_halo_and_leaves_the_picture_only_where_the_border_allows(
    length, tile, halo, multiple, border
):
    end = round_up(length, multiple)
    for start, stop in split(0, length, tile, multiple):
        piece = span(start, stop, length, halo, multiple=multiple, border=border)
        assert (piece.start, piece.stop) == (start, stop)
        assert piece.read_start % multiple == 0 and piece.read_stop % multiple == 0
        first, last = piece.start - halo, piece.stop + halo
        if border == "zero":
            assert 0 <= piece.read_start and piece.read_stop <= end
            first, last = max(first, 0), min(last, end)
        assert piece.read_start <= first and piece.read_stop >= last
        assert piece.size == stop - start and piece.read_size >= piece.size


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 200))
def test_positions_outside_fold_back_as_numpy_pads(length, around):
    pixels = np.arange(length)
    for border in ("reflect", "wrap"):
        folded = [fold(at, length, border) for at in range(-around, length + around)]
        assert folded == np.pad(pixels, around, mode=border).tolist()


@settings(deadline=None, max_examples=60)
@given(lengths, lengths, st.integers(0, 100), st.integers(1 << 12, 1 << 18), multiples)
def test_an_automatic_tile_reads_no_more_than_allowed_unless_it_is_the_smallest(height, width, halo, pixels, multiple):
    rows, columns = auto_tile(height, width, halo, pixels, 1 << 20, multiple=multiple)
    assert rows <= max(round_up(height, multiple), 16) and columns <= max(round_up(width, multiple), 16)
    read = min(rows + 2 * halo, height) * min(columns + 2 * halo, width)
    assert read <= pixels or (rows <= 16 and columns <= 16)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 100))
def test_a_picture_that_fits_is_one_tile(height, width, halo):
    rows, columns = auto_tile(height, width, halo, 200 * 200, 1 << 20)
    assert rows >= height and columns >= width


def test_a_border_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match="border must be one of zero, reflect, wrap, not 'mirror'"):
        check_border("mirror")
