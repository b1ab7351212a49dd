"""What report.html and the model card tell of a build, and the training log that part of it is read from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soka_serve.compiler.methods import METHODS, Method
from soka_serve.errors import BuildError
from soka_serve.io.warn_once import warn

log = logging.getLogger(__name__)

_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


@dataclass(frozen=True)
class ModuleSpectrum:
    """One adapted weight.

    Args:
        module: full name, such as `model.layers.0.self_attn.q_proj`.
        layer: its layer, or None for a module outside the layers.
        projection: the last part of the name, such as `q_proj`.
        shape: the weight's (out, in).
        factor_shape: (m, n, p, q).
        sigma: scales of the candidate terms, descending; empty when no spectrum was computed.
        total_energy: ‖·‖²_F of the matrix that was decomposed, so at least the sum of sigma².
        rank: terms chosen.
        parameters: trainable parameters of the module.
        init: where the factors start, as the manifest names it.
        policy: the rank policy, as the manifest names it.
    """

    module: str
    layer: int | None
    projection: str
    shape: tuple[int, int]
    factor_shape: tuple[int, int, int, int]
    sigma: tuple[float, ...]
    total_energy: float
    rank: int
    parameters: int
    init: str
    policy: str

    def shares(self) -> list[float]:
        """Share of the total energy per candidate term; empty when there is no usable spectrum."""
        energy = [s * s for s in self.sigma]
        total = self.total_energy if self.total_energy > 0 else sum(energy)
        if not (math.isfinite(total) and total > 0):
            return []
        return [e / total for e in energy]

    def captured_frac(self) -> float | None:
        """Share of the energy in the chosen terms, or None when the spectrum cannot tell."""
        shares = self.shares()
        captured = sum(shares[: self.rank])
        return captured if len(shares) >= self.rank and shares and math.isfinite(captured) else None


@dataclass(frozen=True)
class HistoryPoint:
    """What was logged at one optimiser step; None where nothing was."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class Sample:
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
    """

    name: str
    description: str
    base_name: str
    method: str
    created: str
    versions: Mapping[str, str]
    seed: int
    modules: Sequence[ModuleSpectrum]
    history: Sequence[HistoryPoint]
    samples: Sequence[Sample]
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

    @property
    def registered(self) -> Method:
        """The method, as the registry has it."""
        return METHODS[self.method]


def read_history(path: Path) -> list[HistoryPoint]:
    """Read a training log: one JSON object per line with `step` and any of HistoryPoint's other fields.

    Lines of the same step are merged and later ones win, since a resumed run logs some steps again. Objects that
    log something else are passed over. No file means no history: a build with steps = 0 writes none. A broken last
    line, as a killed run leaves it, is passed over with a warning.

    Raises:
        BuildError: for any other line that is not a JSON object, naming the line.
    """
    values: dict[int, dict[str, float]] = {}
    for step, entry in _read_log(path):
        found = {key: float(value) for key in _LOGGED if isinstance(value := entry.get(key), int | float)}
        if found:
            values.setdefault(step, {}).update(found)
    return [HistoryPoint(step, *map(values[step].get, _LOGGED)) for step in sorted(values)]


def read_rank_history(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Read (step, rank) per module from the same training log; empty when it names no modules.

    Raises:
        BuildError: as `read_history` does.
    """
    tracks: dict[str, list[tuple[int, int]]] = {}
    for step, entry in _read_log(path):
        modules = entry.get("modules")
        for module, spectrum in modules.items() if isinstance(modules, dict) else ():
            if isinstance(spectrum, dict) and isinstance(spectrum.get("rank"), int):
                tracks.setdefault(module, []).append((step, spectrum["rank"]))
    return tracks


def _read_log(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(step, entry) per line of a training log."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                warn(log, "%s: the last line (%d) is cut off and was passed over", path, number)
                continue
            raise BuildError(
                f"{path}:{number}: expected a JSON object, got {line[:60]!r}",
                hint="the training log is damaged; delete the build's directory and build again",
            ) from error
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            yield int(entry["step"]), entry
