"""Which runs a comparison has: its search, its finals, and what comes next."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from soka_serve.comparison.plan import Cell, runs_per_cell
from soka_serve.comparison.pool import next_runs
from soka_serve.comparison.read import parse_suite
from soka_serve.comparison.records import keys_of, progress_of, run_keys
from soka_serve.comparison.settings import Setting
from soka_serve.comparison.sweep import choose, seeds_that_agree
from tests.support.suites import START, TEXT, Records, cells_of, record


def search(cell: Cell, loss: Callable[..., float | dict[str, Any]]) -> tuple[list[list[Setting]], Records]:
    """Run a search to its end; what it tried, batch by batch."""
    records: Records = {}
    batches = []
    while runs := choose(cell, records)[1]:
        batches.append([run.setting for run in runs])
        for run in runs:
            found = loss(*dict(run.setting).values())
            records[run.key] = found if isinstance(found, dict) else record(found)
    return batches, records


def test_one_axis_after_the_other_is_searched_from_the_middle() -> None:
    cell = cells_of()[0]
    batches, records = search(cell, lambda rate, scale: abs(rate - 2.0) + abs(scale - 1.0))
    rates = [[("learning_rate", r), ("scale", 2.0)] for r in (2.0, 1.0, 4.0)]
    assert [list(map(list, batch)) for batch in batches[:2]] == [rates, [[("learning_rate", 2.0), ("scale", 1.0)]]]
    choice, _ = choose(cell, records)
    assert choice.setting == (("learning_rate", 2.0), ("scale", 1.0))
    # The last of the five goes along the ridge.
    assert batches[2:] == [[(("learning_rate", 1.0), ("scale", 4.0))]]
    assert choice.border == ("scale",)


@pytest.mark.parametrize("names", [("learning_rate", "scale"), ("train.learning_rate", "train.method_scale")])
def test_a_ridge_of_rate_and_scale_is_followed(names: tuple[str, str]) -> None:
    """A product of two trained factors grows with scale * rate^2, and axes alone do not lead along that."""

    def loss(rate: float, scale: float) -> float:
        return 10 * abs(math.log(scale * rate**2)) + math.log(rate)

    axes = "learning_rate = [1.0, 2.0, 4.0], scale = [1.0, 2.0]"
    cell = cells_of(TEXT.replace(axes, "{!r} = [0.5, 1.0, 2.0], {!r} = [0.5, 1.0]".format(*names)))[0]
    records = search(cell, loss)[1]
    assert len(records) == 5
    assert dict(choose(cell, records)[0].setting or ()) == dict(zip(names, (0.5, 4.0), strict=True))


def test_every_method_is_tried_with_as_many_settings_and_a_border_is_told() -> None:
    first, _, second = cells_of()
    for cell, loss in ((first, lambda rate, scale: -rate * scale), (second, lambda rate: -rate)):
        choice, _ = choose(cell, search(cell, loss)[1])
        assert len(choice.scores) == 5
        assert choice.border == tuple(dict(choice.setting or ()))[-1:]
    assert [dict(s)["learning_rate"] for s in choice.scores] == [2.0, 1.0, 4.0, 8.0, 16.0]
    inside, _ = choose(second, search(second, lambda rate: abs(rate - 1.5))[1])
    assert inside.setting == (("learning_rate", 1.41421),)  # the grid is refined where its best value lies inside
    assert inside.border == ()


def test_zero_is_a_value_that_is_neither_refined_nor_a_border() -> None:
    cell = cells_of(TEXT.replace("scale = [1.0, 2.0]", "clip = [0, 3]"))[0]
    for best in (0, 3):
        choice, _ = choose(cell, search(cell, lambda rate, clip, best=best: rate + abs(clip - best))[1])
        assert {dict(s)["clip"] for s in choice.scores} == {0, 3}
        assert dict(choice.setting or ())["clip"] == best
        assert ("clip" in choice.border) == (best == 3)


def test_finalists_alone_see_the_later_seeds_and_are_chosen_among() -> None:
    changed = "sweep_seeds = [100, 101, 102]\nfinalists = 2\nsettings = 5"
    cell = cells_of(TEXT.replace("sweep_seeds = [100]\nsettings = 5", changed))[2]
    assert runs_per_cell(cell.suite) == (9, 2)
    records: Records = {}
    seen: dict[int, list[float]] = {}
    while runs := choose(cell, records)[1]:
        for run in runs:
            rate = dict(run.setting)["learning_rate"]
            seen.setdefault(run.seed, []).append(rate)
            records[run.key] = record(-rate if run.seed == 100 else rate)  # the first seed wants large rates
            assert set(records) <= set(run_keys(cell, records))
    assert seen == {100: [2.0, 1.0, 4.0, 8.0, 16.0], 101: [16.0, 8.0], 102: [16.0, 8.0]}
    choice, _ = choose(cell, records)
    assert choice.setting == (("learning_rate", 8.0),)
    assert seeds_that_agree(cell, choice, records) == 2
    left = sum(runs_per_cell(cell.suite))
    assert progress_of([cell], records) == {"done": 9, "left": left - 9, "failed": 0}


def test_whole_numbers_stay_whole_and_values_that_no_manifest_takes_are_left_out() -> None:
    text = TEXT.replace(
        "learning_rate = [1.0, 2.0] }", '"adapt.rank.rank" = [1, 2], "train.warmup_frac" = [0.3, 0.6] }'
    )
    cell = cells_of(text)[2]
    choice, _ = choose(cell, search(cell, lambda rank, warmup: -rank * warmup)[1])
    assert {dict(s)["adapt.rank.rank"] for s in choice.scores} == {1, 2}
    assert max(dict(s)["train.warmup_frac"] for s in choice.scores) < 1  # 1.2 would be the next


def test_accuracy_decides_where_it_is_measured_then_the_loss() -> None:
    cell = cells_of()[2]
    right = {1.0: 5, 2.0: 5, 4.0: 4}
    _, records = search(cell, lambda rate: record(rate, right=right.get(rate, 0), answered=10))
    assert choose(cell, records)[0].setting == (("learning_rate", 1.0),)


def test_a_diverged_seed_is_one_of_several() -> None:
    cell = cells_of(TEXT.replace("sweep_seeds = [100]", "sweep_seeds = [100, 101]"))[2]
    records: Records = {}
    while runs := choose(cell, records)[1]:
        for run in runs:
            good = dict(run.setting)["learning_rate"] == 1.0
            records[run.key] = record(1.0, right=10 if good else 1, answered=10)
            if good and run.seed == 100:
                records[run.key] = record(0.0, status="diverged")
    choice, _ = choose(cell, records)
    assert choice.setting == (("learning_rate", 1.0),)  # half right, against a tenth
    assert seeds_that_agree(cell, choice, records) == 1


def test_diverged_runs_are_the_worst_and_failed_ones_do_not_count() -> None:
    cell = cells_of()[2]
    failed, diverged = {"status": "failed", "error": "no"}, record(0.0, status="diverged")
    _, records = search(cell, lambda rate: {2.0: failed, 1.0: diverged}.get(rate, rate))
    choice, _ = choose(cell, records)
    assert choice.setting is not None
    assert dict(choice.setting)["learning_rate"] not in (1.0, 2.0)
    batches, records = search(cell, lambda rate: failed)
    assert (len(batches), choose(cell, records)[0].failed) == (1, True)  # it stops where nothing works


def test_order_is_priority_then_sweeps_then_seeds_over_all_cells() -> None:
    cells = cells_of()
    runs = next_runs(cells, {})
    assert [(r.method, r.dataset) for r in runs] == [("first", "math")] * 3 + [("first", "code")] * 3 + [
        ("second", "code")
    ] * 2
    records = {k: r for cell in cells[:2] for k, r in search(cell, lambda rate, scale: rate * scale)[1].items()}
    runs = next_runs(cells, records)
    assert [(r.stage, r.method, r.dataset, r.seed) for r in runs] == [
        ("final", "first", "math", 0),
        ("final", "first", "code", 0),
        ("final", "first", "math", 1),
        ("final", "first", "code", 1),
        ("sweep", "second", "code", 100),
        ("sweep", "second", "code", 100),
    ]
    while runs := next_runs(cells, records):
        records |= {run.key: record(1.0) for run in runs}
    assert len(records) == 3 * (5 + 2)


def test_where_there_is_one_setting_nothing_is_searched() -> None:
    text = TEXT.replace("settings = 5", "settings = 1")
    cells = cells_of(text)
    runs = next_runs(cells, {})
    assert [(r.stage, r.method, r.dataset, r.seed) for r in runs[:2]] == [
        ("final", "first", "math", 0),
        ("final", "first", "code", 0),
    ]
    assert {r.stage for r in runs} == {"final"}
    assert runs[0].setting == START
    assert runs_per_cell(parse_suite(text, "s.toml")) == (0, 2)
    assert progress_of(cells, {}) == {"done": 0, "left": 6, "failed": 0}


def test_runs_of_a_setting_that_is_being_tried_are_counted_and_handed_on() -> None:
    cells = cells_of()[2:]
    records = {run.key: record(1.0) for run in next_runs(cells, {})[:1]}
    assert progress_of(cells, records) == {"done": 1, "left": 6, "failed": 0}
    assert set(records) < set(keys_of(cells, records))
