"""The variables of report.html, worked out from ReportData: sentences, big figures, tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard
from urllib.parse import quote

from soka_serve.compiler.methods import FULL, LORA
from soka_serve.compiler.report.charts import Axis
from soka_serve.compiler.report.data import HistoryPoint, ReportData
from soka_serve.compiler.report.measured import intruder_map, spectrum_panels
from soka_serve.compiler.report.panels import curves, heat_maps, layer_span, logged, pruning, spectra
from soka_serve.io.text import accuracy_interval, count, duration, flatten, percent, plain, size, span, times, words
from soka_serve.starts import ROWS

_MOST_SAMPLES = 40
_STAGE_WORDS = {"init": "initialisation", "tune": "fine-tuning", "check": "accuracy check"}
# Parts of soka.lock that the page tells in other places.
_TOLD = ("versions", "comparison", "seed", "created", "name")


@dataclass(frozen=True)
class KeyFigure:
    """One of the key figures at the top of the page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class SizeRow:
    """A method's trainable parameters; `place` is its place on a log scale, in percent of the width."""

    name: str
    parameters: int
    place: float
    ratio: float
    own: bool


def page_context(data: ReportData) -> dict[str, object]:
    """The variables of report.html.jinja."""
    before, after = _counted(data.accuracy_before), _counted(data.accuracy_after)
    starts = [ROWS[init] for init in sorted({m.init for m in data.modules})]
    return {
        "data": data,
        "before": before,
        "after": after,
        "outcome": _outcome(data, before, after),
        "figures": _figures(data, before, after),
        "from_spectrum": not any(start.drawn for start in starts),
        "starts": [start.told for start in starts],
        "sizes": _sizes(data),
        "spectrum_of": starts[0].spectrum_of if len(starts) == 1 else "the decomposed matrix",
        "spectra": spectra(data.modules),
        "layer_span": layer_span(data.modules),
        "heat_maps": heat_maps(data.modules),
        "rank_span": span([m.rank for m in data.modules]),
        "intruders": intruder_map(data.measured),
        "looks": spectrum_panels(data.measured),
        "curves": curves(data.history),
        "pruning": pruning(data.rank_over_time or {}),
        "not_finite": _not_finite(data.history),
        "timings": [(_stage(stage), seconds) for stage, seconds in data.timings_s.items() if stage != "total"],
        "summary": [(words(key.replace(".", ", ")), text) for key, text in flatten(data.data_summary)],
        # './' keeps a name with a colon from being read as a URL's scheme.
        "links": [(words(name), path, "./" + quote(path.removeprefix("./"))) for name, path in data.artefacts.items()],
        "lock": flatten({k: v for k, v in data.lock.items() if k not in _TOLD and not _is_long(v)}),
        "long_lock": {k: flatten(v) for k, v in data.lock.items() if k not in _TOLD and _is_long(v)},
        "samples": data.samples[:_MOST_SAMPLES],
    }


def _is_long(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping) and len(flatten(value)) > 10


def _counted(accuracy: tuple[int, int] | None) -> tuple[int, int] | None:
    return accuracy if accuracy is not None and accuracy[1] > 0 else None


def _losses(data: ReportData) -> list[float]:
    return [p.loss for p in data.history if p.loss is not None and math.isfinite(p.loss)]


def _outcome(data: ReportData, before: tuple[int, int] | None, after: tuple[int, int] | None) -> str:
    """The result in a sentence or two."""
    base = f"; the base model has {count(data.base_parameters)}" if data.base_parameters else ""
    trained = f"{count(data.trainable_parameters)} parameters were trained{base}."
    if not data.history:
        trained = "No training step was taken: what is stored is the initialisation."
    if after and before:
        return (
            f"The base model alone answers {_of(before)} held-out problems correctly. "
            f"With the adapter it answers {_of(after)}. {trained}"
        )
    if after:
        return f"The model answers {_of(after)} held-out problems correctly. {trained}"
    losses = _losses(data)
    if len(losses) > 1:
        steps = count(max(p.step for p in data.history))
        return f"The training loss went from {plain(losses[0])} to {plain(losses[-1])} in {steps} steps. {trained}"
    return trained


def _stage(name: str) -> str:
    return _STAGE_WORDS.get(name, words(name))


def _of(accuracy: tuple[int, int]) -> str:
    return f"{count(accuracy[0])} of {count(accuracy[1])}"


def _figures(data: ReportData, before: tuple[int, int] | None, after: tuple[int, int] | None) -> list[KeyFigure]:
    figures = []
    losses = _losses(data)
    if after:
        low, high = accuracy_interval(after)
        value, note = percent(after[0] / after[1]), f"95% interval {100 * low:.0f}–{100 * high:.0f}%, {_of(after)}"
        if before:
            value = f"{percent(before[0] / before[1])} → {value}"
        figures.append(KeyFigure("Accuracy before → after" if before else "Accuracy", value, note))
    elif len(losses) > 1:
        value = f"{plain(losses[0])} → {plain(losses[-1])}"
        figures.append(KeyFigure("Training loss", value, "first and last value logged"))
    if data.trainable_parameters:
        notes = []
        rank_two = data.comparison.get("LoRA r=2", 0)
        if rank_two and data.registered is not LORA:
            notes.append(f"{times(data.trainable_parameters / rank_two)} LoRA r=2 ({count(rank_two)})")
        if data.base_parameters:
            notes.append(f"{percent(data.trainable_parameters / data.base_parameters)} of the base")
        figures.append(KeyFigure("Trainable parameters", count(data.trainable_parameters), ", ".join(notes)))
    if data.adapter_bytes:
        figures.append(KeyFigure("Adapter on disk", size(data.adapter_bytes), "the base model stays as it is"))
    if data.timings_s:
        stages = {stage: seconds for stage, seconds in data.timings_s.items() if stage != "total"}
        total = data.timings_s.get("total", sum(stages.values()))
        longest = max(stages, key=lambda stage: stages[stage], default="")
        note = f"of which {_stage(longest)} {duration(stages[longest])}" if len(stages) > 1 else ""
        figures.append(KeyFigure("Time to build", duration(total), note))
    return figures


def _sizes(data: ReportData) -> list[SizeRow]:
    """This adapter among the other methods, fewest parameters first; empty when there is nothing to compare."""
    own = data.trainable_parameters
    named = {FULL.label if name == FULL.name else name: number for name, number in data.comparison.items()}
    others = [(name, number, False) for name, number in named.items() if number > 0]
    if own <= 0 or not others:
        return []
    rows = sorted([("this adapter", own, True), *others], key=lambda row: row[1])
    axis = Axis(rows[0][1] / 2, rows[-1][1] * 2, (), "", log=True)
    return [SizeRow(name, number, 100 * axis.place(number), number / own, mine) for name, number, mine in rows]


def _not_finite(history: Sequence[HistoryPoint]) -> list[str]:
    """Steps at which a logged value was NaN or infinite, in words."""
    found = []
    for field in ("loss", "grad_norm", "eval_loss"):
        steps = [step for step, value in logged(history, field) if not math.isfinite(value)]
        if steps:
            others = f" and at {len(steps) - 1} later step{'s' * (len(steps) > 2)}" if len(steps) > 1 else ""
            found.append(f"{words(field)} was not a finite number at step {count(steps[0])}{others}")
    return found
