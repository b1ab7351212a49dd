"""What report.html and the model card tell of a build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from soka_serve.compiler.methods import METHODS, Method
from soka_serve.regularisers import REGULARISERS

if TYPE_CHECKING:
    from soka_serve.compiler.init.result import ModuleInit

_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy")


@dataclass(frozen=True)
class HistoryPoint:
    """What was logged at one optimiser step; None where nothing was."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    regularisers: Mapping[str, float] = field(default_factory=dict)
    """The value of each that [train.regularise] sets, by its name."""


@dataclass(frozen=True)
class AnswerPair:
    """One held-out problem and the model's answers without and with the adapter (texts as generated, untrusted)."""

    prompt: str
    expected: str
    before: str
    after: str
    before_ok: bool | None = None
    after_ok: bool | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything that report.html and the model card show.

    `accuracy_before` and `accuracy_after` are (correct, total). `comparison` maps other methods to the trainable
    parameters that they would need on the same modules. `artefacts` maps names to paths relative to the report.
    `rank_over_time` maps modules to (step, rank), where terms were dropped in training. Times are in seconds.
    `measured` is what `soka_serve.compiler.measures` returned, by name. `quantize` names the bits of the base that the
    adapter adds to, where it is right on that alone.
    """

    name: str
    description: str
    base_name: str
    method: str
    created: str
    versions: Mapping[str, str]
    seed: int
    modules: Sequence[ModuleInit]
    history: Sequence[HistoryPoint]
    samples: Sequence[AnswerPair]
    accuracy_before: tuple[int, int] | None
    accuracy_after: tuple[int, int] | None
    trainable_parameters: int
    base_parameters: int
    comparison: Mapping[str, int]
    adapter_bytes: int
    dropped_energy_frac: float
    data_summary: Mapping[str, object]
    manifest_text: str
    lock: Mapping[str, object]
    artefacts: Mapping[str, str]
    rank_over_time: Mapping[str, Sequence[tuple[int, int]]] | None
    timings_s: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None

    @property
    def registered(self) -> Method:
        """The method, as the registry has it."""
        return METHODS[self.method]


def history_points(log: Sequence[Mapping[str, Any]]) -> list[HistoryPoint]:
    """What a training log says per step; entries of one step are merged, and later ones win.

    Args:
        log: from `soka_serve.compiler.history.read_history`. Entries that tell something else are passed over.
    """
    values: dict[int, dict[str, float]] = {}
    for entry in log:
        keys = (*_LOGGED, *REGULARISERS)
        found = {key: float(value) for key in keys if isinstance(value := entry.get(key), int | float)}
        if found:
            values.setdefault(int(entry["step"]), {}).update(found)
    return [
        HistoryPoint(
            step,
            said.get("loss"),
            said.get("grad_norm"),
            said.get("learning_rate"),
            said.get("eval_loss"),
            said.get("eval_accuracy"),
            {key: said[key] for key in REGULARISERS if key in said},
        )
        for step, said in sorted(values.items())
    ]


def rank_history(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """(step, rank) per module from a training log; empty when it names no modules."""
    tracks: dict[str, list[tuple[int, int]]] = {}
    for entry in log:
        modules = entry.get("modules")
        for module, spectrum in modules.items() if isinstance(modules, dict) else ():
            if isinstance(spectrum, dict) and isinstance(spectrum.get("rank"), int):
                tracks.setdefault(module, []).append((int(entry["step"]), spectrum["rank"]))
    return tracks
