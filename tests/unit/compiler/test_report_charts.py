"""Axes, ticks and paths of the charts, and how numbers are written."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from soka_serve.compiler.report.charts import Mark, Series, chart, linear_axis, log_axis, term_axis, thin
from soka_serve.io.text import (
    accuracy_interval,
    count,
    duration,
    flatten,
    moment,
    percent,
    plain,
    size,
    span,
    times,
    value_text,
)

numbers = st.floats(min_value=-1e12, max_value=1e12, allow_subnormal=False)


@given(st.lists(numbers | st.just(math.nan), max_size=5), st.booleans())
@example([-1e12, -999999999999.9999], False)
@example([1e12, 1000000000000.0001, 1e12 - 0.001], False)
@example([-1e12, -999999999999.9999], True)
def test_linear_axis_holds_its_values_and_has_a_few_rising_ticks(values: list[float], zero: bool) -> None:
    axis = linear_axis(values, "x", zero=zero)
    assert axis.low < axis.high
    assert all(axis.holds(v) for v in values if math.isfinite(v))
    places = [value for value, _ in axis.ticks]
    assert 1 <= len(places) <= 6
    assert all(a < b for a, b in pairwise(places))
    assert all(axis.holds(place) for place in places)


@given(st.lists(st.floats(min_value=1e-6, max_value=1e2), max_size=5))
def test_log_axis_holds_its_values(values: list[float]) -> None:
    axis = log_axis([*values, 0.0, -1.0, math.nan], "y")
    assert 0 < axis.low < axis.high
    assert all(axis.holds(v) for v in values)
    assert 1 <= len(axis.ticks) <= 9
    assert all(axis.holds(place) for place, _ in axis.ticks)
    assert not axis.holds(0.0)
    assert not axis.holds(-1.0)


@pytest.mark.parametrize("terms", [0, 1, 2, 64, 1000, 10**6])
def test_term_axis_begins_with_the_first_term(terms: int) -> None:
    axis = term_axis(terms, "term")
    assert axis.ticks[0] == (1.0, "1")
    assert len(axis.ticks) <= 10
    assert axis.holds(1)
    assert axis.holds(max(terms, 1))


@pytest.mark.parametrize(("number", "most"), [(0, 5), (1, 5), (5, 5), (1001, 60)])
def test_thin_keeps_both_ends(number: int, most: int) -> None:
    points = [(float(k), 0.0) for k in range(number)]
    kept = thin(points, most)
    assert len(kept) == min(number, most)
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    assert len(set(kept)) == len(kept)


def draw(*series: Series) -> str:
    values = [y for line in series for _, y in line.points]
    return str(chart(series, linear_axis([0, 10], "x"), linear_axis(values, "y"), summary="a <chart>"))


def test_a_gap_breaks_the_line() -> None:
    svg = draw(Series([(0, 0), (1, 1), (2, math.nan), (3, 1), (4, 0), (5, math.inf), (6, 1)], "main"))
    (path,) = re.findall(r'class="line" d="([^"]*)"', svg)
    assert path.count("M") == 3
    assert path.endswith("h0")  # the lone last point


def test_a_step_line_moves_only_across_and_down() -> None:
    (path,) = re.findall(r'class="line" d="([^"]*)"', draw(Series([(0, 4), (5, 2), (10, 2)], "main", step=True)))
    assert re.fullmatch(r"M[\d. ]+(H[\d.]+V[\d.]+){2}", path)


def test_labels_and_tooltips_are_escaped() -> None:
    svg = draw(Series([(0, 0), (1, 1)], 'm"x', tooltip="<b>", marks=[Mark(1, 1, "<i>")]))
    assert "a &lt;chart&gt;" in svg
    assert "<title>&lt;b&gt;</title>" in svg
    assert "<title>&lt;i&gt;</title>" in svg
    assert 'class="m&#34;x"' in svg


def test_marks_outside_are_left_out() -> None:
    assert "<circle" not in draw(Series([(0, 0), (1, 1)], "main", marks=[Mark(99, 0, ""), Mark(1, math.nan, "")]))


def test_numbers_as_people_read_them() -> None:
    for write, values, expected in (
        (plain, (0, 1, 0.25, 1234, 1e-5, 2.5e9, 0.00123), "0 | 1 | 0.25 | 1,234 | 1e-5 | 2e9 | 0.00123"),
        (percent, (0, 1, 0.0213, 0.93, 1e-7, 0.925), "0% | 100% | 2.13% | 93% | 1e-5% | 92.5%"),
        (size, (0, 999, 54640, 3.96e6, 13.5e9, 2e12), "0 bytes | 999 bytes | 54.6 kB | 3.96 MB | 13.5 GB | 2 TB"),
        (duration, (0.04, 9.94, 9.96, 59.6, 92), "0.0 s | 9.9 s | 10 s | 1 min 0 s | 1 min 32 s"),
        (duration, (7213, math.nan), "2 h 0 min | –"),
        (times, (0.711, 1, 5.06, 6823.4), "0.71× | 1× | 5.1× | 6,823×"),
        (span, ([], [2, 2], [8, 2]), "– | 2 | 2–8"),
        (value_text, (None, True, False, 4000, 0.5, math.nan, ["a", 1]), "– | yes | no | 4,000 | 0.5 | nan | a, 1"),
        (value_text, ("x",), "x"),
        (moment, ("yesterday",), "yesterday"),
        (count, (12345.6,), "12,346"),
    ):
        assert " | ".join(write(value) for value in values) == expected  # type: ignore[operator]
    assert span([0.1, 0.25], percent) == "10–25%"


def test_flatten_names_leaves_by_their_dotted_key() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == [("a.b.c", "1"), ("d", "–")]


def test_accuracy_interval_is_wilsons() -> None:
    # Reference: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I (81 of 263).
    low, high = accuracy_interval((81, 263))
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert accuracy_interval((0, 10))[0] == 0.0
    assert accuracy_interval((10, 10))[1] == pytest.approx(1.0)
