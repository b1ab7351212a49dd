"""A run of a comparison trains as a build with the same keys does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from soka_serve.comparison.callbacks import MemoryMeter
from soka_serve.comparison.inputs import read_inputs
from soka_serve.comparison.plan import Cell, list_cells
from soka_serve.comparison.read import LoadedSuite, read_suite
from soka_serve.comparison.run import measure_run
from soka_serve.compiler.train import trainer as trainer_module
from soka_serve.compiler.train.callbacks import Pruning
from soka_serve.io.workspace import HashCache

SUITE = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 4
batch_size = 4
max_length = 128
[protocol]
seeds = [0]
validation = 4
test = 4
answered = 0
[[dataset]]
name = "math"
data = { builtin = "math", limit = 32 }
[[method]]
name = "plain"
method = "soka"
grid = { learning_rate = [8] }
[[method]]
name = "protected"
method = "soka"
grid = { "train.regularise.protect" = [4] }
[[method]]
name = "pruned"
method = "soka"
adapt = { rank = { policy = "fixed", rank = 2 } }
grid = { "train.prune.threshold" = [0.9] }
[[method]]
name = "other-optimiser"
method = "soka"
train = { optimiser = "adafactor" }
grid = { learning_rate = [8] }
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedSuite, dict[str, Cell]]:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "s.toml").write_text(SUITE)
    loaded = read_suite(folder / "s.toml")
    return loaded, {c.contender.name: c for c in list_cells(loaded.suite, read_inputs(loaded, HashCache(folder / "h")))}


def run(loaded: tuple[LoadedSuite, dict[str, Cell]], name: str, work: Path) -> list[float]:
    """The training losses of a method's one run."""
    suite, cells = loaded
    (spec,) = cells[name].finals(tuple((axis, values[0]) for axis, values in cells[name].contender.grid.items()))
    record = measure_run(suite, spec, work)
    assert (record["suite"], record["claims_sha256"]) == (suite.suite.name, suite.suite.claims_sha256)
    losses: list[float] = record["loss"]
    return losses


@pytest.mark.slow
def test_a_constraint_constrains(loaded: tuple[LoadedSuite, dict[str, Cell]], tmp_path: Path) -> None:
    constrained, plain = run(loaded, "protected", tmp_path), run(loaded, "plain", tmp_path)
    assert constrained[0] == plain[0]
    assert constrained[-1] != plain[-1]


@pytest.mark.slow
def test_terms_are_pruned(
    loaded: tuple[LoadedSuite, dict[str, Cell]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the manifest's own numbers a term is dropped after a hundred steps at the earliest."""
    sooner = {"every": 1, "patience": 1}
    monkeypatch.setattr(trainer_module, "Pruning", lambda rules: Pruning(rules.model_copy(update=sooner)))
    with_it = run(loaded, "pruned", tmp_path)
    monkeypatch.setattr(trainer_module, "Pruning", lambda rules: Pruning(rules))
    without = run(loaded, "pruned", tmp_path)
    assert with_it[0] == without[0]
    assert with_it[-1] != without[-1]


@pytest.mark.slow
def test_a_methods_own_optimiser_steps(loaded: tuple[LoadedSuite, dict[str, Cell]], tmp_path: Path) -> None:
    other, plain = run(loaded, "other-optimiser", tmp_path), run(loaded, "plain", tmp_path)
    assert other[0] == plain[0]
    assert other[-1] != plain[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let a peak begin anew")
def test_memory_is_that_of_training() -> None:
    meter = MemoryMeter()
    before = bytearray(300 << 20)  # as measuring the base takes
    del before
    assert meter.peak_bytes() is None
    meter.start_training()
    peak = meter.peak_bytes()
    assert peak is not None
    assert peak < 100 << 20
    step = bytearray(300 << 20)
    del step
    peak = meter.peak_bytes()
    assert peak is not None
    assert peak > 200 << 20
