"""Which setting a search chooses: along one axis at a time, the same number of settings for every method.

The search begins in the middle of the grid and tries all values of one axis after the other, each time from the best
setting so far (coordinate search). Then, as long as settings are left: along the ridge of rate and scale, beyond an end
of an axis where the best value lies, along the axes through the best setting, and between the best value and its
neighbours. The ridge is there because what a product of two trained factors changes grows with scale * rate^2: a search
along the axes alone cannot follow it. With `finalists`, that search looks at the first sweep seed alone; the others
choose among the settings that it found best. Where a suite has one setting for each method, nothing is searched.

A search has no state of its own: everything follows from the suite and its records, so it may be killed at any time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from soka_serve.comparison.plan import Cell, Record, RunSpec
from soka_serve.comparison.settings import Setting
from soka_serve.comparison.suite import Contender

Grid = Mapping[str, Sequence[float]]
Score = tuple[float, float]
"""What a setting is chosen by, and what decides between equals; more is better."""


@dataclass(frozen=True)
class Choice:
    """What the search of a cell has found so far.

    `scores` has every setting that was tried (None where all its runs failed), `trying` those whose runs are not all
    there, `finalists` those that see every sweep seed. `setting` is None as long as the search goes on, and if every
    run failed. `border` names the axes on which the chosen value is the smallest or the largest that was tried.
    """

    scores: Mapping[Setting, Score | None]
    finalists: tuple[Setting, ...] = ()
    setting: Setting | None = None
    border: tuple[str, ...] = ()
    failed: bool = False
    trying: tuple[Setting, ...] = ()


def choose(cell: Cell, records: Mapping[str, Record]) -> tuple[Choice, list[RunSpec]]:
    """The choice as far as a cell's search has come, and the sweep runs that it needs next."""
    grid, (first, others) = cell.contender.grid, _seeds(cell)
    if cell.suite.settings == 1:
        return Choice({}, setting=_middle(grid)), []
    scores: dict[Setting, Score | None] = {}
    while settings := _next(grid, scores, cell):
        runs = {s: [cell.spec("sweep", s, seed) for seed in first] for s in settings}
        missing = [run for found in runs.values() for run in found if run.key not in records]
        if missing:
            return Choice(scores, trying=tuple(settings)), missing
        scores |= {s: _score([records[run.key] for run in found]) for s, found in runs.items()}
        if not any(scores.values()):
            return Choice(scores, failed=True), []
    finalists = tuple(sorted(scores, key=lambda s: _rank(scores[s]), reverse=True)[: cell.suite.protocol.finalists])
    runs = {s: [cell.spec("sweep", s, seed) for seed in (*first, *others)] for s in finalists}
    missing = [run for found in runs.values() for run in found if run.key not in records]
    if missing:
        return Choice(scores, finalists), missing
    last = {s: _score([records[run.key] for run in found]) for s, found in runs.items()}
    scores |= last
    best = _best(last)
    border = tuple(
        axis
        for axis, value in best
        if len(tried := _tried(scores, axis)) > 1
        and value in (min(tried), max(tried))
        and value
        and len(grid[axis]) > 1
    )
    return Choice(scores, finalists, best, border), []


def _seeds(cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sweep seeds that every setting sees, and those that finalists see besides."""
    protocol = cell.suite.protocol
    everywhere = len(protocol.sweep_seeds) if protocol.finalists is None else 1
    return protocol.sweep_seeds[:everywhere], protocol.sweep_seeds[everywhere:]


def _next(grid: Grid, scores: Mapping[Setting, Score | None], cell: Cell) -> list[Setting]:
    """The settings to try next; empty when the search is over."""
    left = cell.suite.settings - len(scores)
    if left <= 0:
        return []
    if not scores:
        return _line(_middle(grid), next(iter(grid)), grid)[:left]
    best = _best(scores)
    unseen = [axis for axis, values in grid.items() if set(values) - _tried(scores, axis)]
    for line in (
        *(_line(best, axis, grid) for axis in unseen),
        _along_ridge(best, cell.contender),
        *(_with(best, axis, _beyond(best, axis, scores)) for axis in grid),
        *(_line(best, axis, grid) for axis in grid),
        *(_with(best, axis, _between(best, axis, scores)) for axis in grid),
    ):
        fresh = [setting for setting in line if setting not in scores and cell.takes(setting)]
        if fresh:
            return fresh[:left]
    return []


def _middle(grid: Grid) -> Setting:
    return tuple((axis, values[len(values) // 2]) for axis, values in grid.items())


def _best(scores: Mapping[Setting, Score | None]) -> Setting:
    """The best setting; among equals the one that was tried first."""
    return max(scores, key=lambda setting: _rank(scores[setting]))


def _rank(score: Score | None) -> Score:
    """A score to sort by: without one, the worst."""
    return score or (-math.inf, -math.inf)


def _tried(scores: Mapping[Setting, Score | None], axis: str) -> set[float]:
    return {dict(setting)[axis] for setting in scores}


def _with(setting: Setting, axis: str, values: Sequence[float]) -> list[Setting]:
    """The setting with other values on one axis."""
    return [tuple((name, value if name == axis else old) for name, old in setting) for value in values]


def _line(setting: Setting, axis: str, grid: Grid) -> list[Setting]:
    """The settings along an axis, those near the given one first."""
    values = list(grid[axis])
    here = dict(setting)[axis]
    return _with(setting, axis, sorted(values, key=lambda value: _distance(value, here)))


def _distance(value: float, here: float) -> float:
    """How far two values are apart, as a logarithm of their ratio; 0, where an axis has it, is far from all others."""
    if value == here:
        return 0.0
    return abs(math.log(value / here)) if value and here else math.inf


def _along_ridge(setting: Setting, contender: Contender) -> list[Setting]:
    """The settings whose rate is a step of its axis higher or lower, and whose scale makes up for it."""
    axes = {contender.key_of(axis): axis for axis in contender.grid}
    rate, scale = (axes.get(contender.key_of(name)) for name in ("learning_rate", "scale"))
    if rate is None or scale is None or len(rates := sorted(contender.grid[rate])) < 2:
        return []
    values, step = dict(setting), min(after / before for before, after in itertools.pairwise(rates))
    found = []
    for factor in (1 / step, step):
        moved = {rate: _rounded(values[rate] * factor), scale: _rounded(values[scale] / factor**2)}
        found.append(tuple((axis, moved.get(axis, value)) for axis, value in setting))
    return found


def _beyond(setting: Setting, axis: str, scores: Mapping[Setting, Score | None]) -> list[float]:
    """One value more beyond the end at which the setting lies, as far as the two last values are apart."""
    here, tried = dict(setting)[axis], sorted(_tried(scores, axis) - {0})
    if len(tried) < 2 or here not in (tried[0], tried[-1]):
        return []
    return [_rounded(here * here / (tried[1] if here == tried[0] else tried[-2]))]


def _between(setting: Setting, axis: str, scores: Mapping[Setting, Score | None]) -> list[float]:
    """The geometric means of the setting's value and its neighbours on an axis."""
    here, tried = dict(setting)[axis], sorted(_tried(scores, axis))
    at = tried.index(here)
    nearest = tried[max(at - 1, 0) : at + 2]
    return [_rounded(math.sqrt(here * near)) for near in nearest if near != here and near * here]


def _rounded(value: float) -> float:
    """To six digits. Keys that take whole numbers refuse it, and keep to their grid."""
    return float(f"{value:.6g}")


def _score(records: Sequence[Record]) -> Score | None:
    """Mean over the seeds of the accuracy, where answers were marked, then of minus the loss.

    A diverged run has accuracy 0 and an infinite loss; a failed one is left out.
    """
    known = [record for record in records if record["status"] != "failed"]
    if not known:
        return None
    accuracy = sum((_accuracy(record) for record in known), 0.0) / len(known)
    loss = sum((_loss(record) for record in known), 0.0) / len(known)
    return (accuracy, -loss) if any(record["answered"] for record in known) else (-loss, 0.0)


def _accuracy(record: Record) -> float:
    return float(record["correct"] / record["answered"]) if record["status"] == "done" and record["answered"] else 0.0


def _loss(record: Record) -> float:
    if record["status"] != "done":
        return math.inf
    losses = record["answer_loss"]
    return float(sum(losses) / len(losses))


def seeds_that_agree(cell: Cell, choice: Choice, records: Mapping[str, Record]) -> int:
    """How many sweep seeds would have chosen the same setting by themselves, of those that all of them saw."""
    own = [
        {setting: _score([records[cell.spec("sweep", setting, seed).key]]) for setting in choice.finalists}
        for seed in cell.suite.protocol.sweep_seeds
    ]
    return sum(_best(scores) == choice.setting for scores in own)


def sweep_keys(cell: Cell, choice: Choice) -> Iterator[str]:
    """Keys of the sweep runs that a choice rests on, or will."""
    first, others = _seeds(cell)
    for settings, seeds in (((*choice.scores, *choice.trying), first), (choice.finalists, others)):
        yield from (cell.spec("sweep", setting, seed).key for setting in settings for seed in seeds)
