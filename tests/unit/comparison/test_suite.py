"""Comparison suites: what a file may say; which runs it has, what they are filed under, and which come next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from soka_serve.comparison.plan import Cell, RunInputs, RunSpec, list_cells
from soka_serve.comparison.pool import next_runs
from soka_serve.comparison.preview import preview
from soka_serve.comparison.suite import Suite, manifest_of, parse_suite, read_suite
from soka_serve.comparison.sweep import choose_rate, extend
from soka_serve.errors import ManifestError

SUITES = Path(__file__).resolve().parents[3] / "eval" / "suites"

GOOD = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 3
[[dataset]]
name = "math"
data = { builtin = "math" }
[[method]]
name = "a"
method = "lora"
rates = [4e-3, 1e-3]
[[method]]
name = "b"
method = "soka"
rates = [1e-2]
adapt = { init = "random", rank = { policy = "fixed", rank = 2 } }
"""


def problems(text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_suite(text, "s.toml")
    return str(caught.value)


def test_a_suite_and_its_defaults() -> None:
    suite = parse_suite(GOOD, "s.toml")
    assert suite.method[0].rates == (1e-3, 4e-3)  # in order, however they were written
    assert suite.protocol.seeds == (0, 1, 2, 3, 4)
    assert [d.name for d in suite.datasets_of(suite.method[1])] == ["math"]
    assert suite.loss_reference is None


def test_the_manifest_of_a_run_has_the_methods_rule_and_the_shared_recipe() -> None:
    suite = parse_suite(GOOD, "s.toml")
    manifest = manifest_of(suite, suite.contender("b"), suite.dataset[0], rate=1e-2, seed=7)
    assert (manifest.train.method, manifest.train.learning_rate, manifest.train.seed) == ("soka", 1e-2, 7)
    assert (manifest.train.steps, manifest.train.batch_size) == (3, 8)
    assert manifest.adapt[0].init == "random"
    assert manifest.adapt[0].rank.policy == "fixed"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 3", "stepz = 3", "s.toml:7:1: train.stepz: unknown key (did you mean 'steps'?)"),
        ("steps = 3", "", "train.steps: required, but missing"),
        ("steps = 3", "steps = 3\nlearning_rate = 1e-3", "train.learning_rate: unknown key"),
        ('method = "lora"', 'method = "LoRa"', "(did you mean 'lora'?)"),
        ("rates = [1e-2]", "rates = [0.0]", "method[1].rates[0]: expected a number, above 0; got 0.0"),
        ("rates = [1e-2]", "rates = [1e-2, 1e-2]", "a value is written twice"),
        ("rates = [1e-2]", "rates = []", "method[1].rates: expected an array of numbers, at least 1"),
        ("rates = [1e-2]", "rates = [1e-2]\nrank = 2", "rank does not go with method = 'soka'"),
        ("rates = [4e-3", "sigma_lr = 0.0\nrates = [4e-3", "sigma_lr belongs to method = 'soka'; the method is 'lora'"),
        ("rates = [4e-3", "calibration_batches = 2\nrates = [4e-3", "calibration_batches belongs to corda and eva"),
        ('name = "b"', 'name = "a"', 'method[1].name: "a" is the name of another method already'),
        ("rates = [1e-2]", 'rates = [1e-2]\ndatasets = ["x"]', 'no dataset is called "x"; there are math'),
        ("steps = 3", "steps = 3\n[protocol]\nsweep_seeds = [4]", "4 stands in seeds too"),
        ("steps = 3", 'steps = 3\n[protocol]\nloss_reference = "z"', 'no method is called "z"; there are a, b'),
        ("[[dataset]]", '[[claim]]\ncandidate = "b"\nreferences = ["z"]\n[[dataset]]', 'no method is called "z"'),
        ('{ builtin = "math" }', '{ builtin = "math" }\nanswers = "boxed"', "builtin families mark their own answers"),
        ('{ builtin = "math" }', '{ jsonl = "x.jsonl" }', "answers is required for data of your own"),
        ('{ builtin = "math" }', '{ jsonl = "x.jsonl" }\nanswers = "exact"', "a comparison needs evaluation data"),
        ("schema = 1", "schema = true", "schema: expected the integer 1; got true"),
        ('init = "random"', 'init = "random", calibration_batches = 2', "nothing is decomposed"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in problems(GOOD.replace(old, new, 1))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    text = GOOD.replace("steps = 3", "stepz = 3").replace('"lora"', '"lara"').replace("[1e-2]", "[-1.0]")
    assert len(problems(text).splitlines()) == 4  # steps is missing, too


def test_manifests_are_still_explained_as_manifests() -> None:
    from soka_serve.manifest.read import parse_manifest

    problems(GOOD.replace("steps = 3", "stepz = 3"))
    with pytest.raises(ManifestError, match="unknown key"):
        parse_manifest(GOOD, "m.toml")


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_can_be_planned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = read_suite(file).suite
    made = preview(file)
    assert set(made.parameters) == {m.name for m in suite.method}
    assert all(0 < low <= high <= made.base_parameters for low, high in made.parameters.values())
    assert f"{suite.method[0].name}" in made.to_text()


def test_the_paper_suite_tests_its_claim_with_a_quarter_fewer_parameters() -> None:
    file = SUITES / "paper.toml"
    suite, parameters = read_suite(file).suite, preview(file).parameters
    named = {name for claim in suite.claim for name in (claim.candidate, *claim.references)}
    for init in ("calibrated", "weights", "zero"):
        assert parameters[f"soka-{init}-5of7"][1] <= 0.75 * parameters["lora-r1"][0]
        assert parameters[f"soka-{init}-14000"][1] <= 0.75 * parameters["lora-r2"][0]
    # The claim is about all families, and comes before everything else.
    for name in named:
        assert suite.contender(name).datasets is None
        assert suite.contender(name).priority == 1


# --- which runs a comparison has --------------------------------------------------------------------------------------


TEXT = """
schema = 1
name = "s"
[base]
builtin = "tiny"
[train]
steps = 20
[protocol]
seeds = [0, 1]
extensions = 2
[[dataset]]
name = "math"
data = { builtin = "math" }
[[dataset]]
name = "code"
data = { builtin = "code" }
[[method]]
name = "first"
method = "lora"
rates = [1.0, 2.0, 4.0]
[[method]]
name = "second"
method = "soka"
rates = [1.0]
priority = 2
datasets = ["code"]
"""
INPUTS = RunInputs("base", {"math": "m", "code": "c"}, {"torch": "1"}, "cpu")

Records = dict[str, dict[str, Any]]


def suite(text: str = TEXT) -> Suite:
    return parse_suite(text, "s.toml")


def cell(text: str = TEXT, inputs: RunInputs = INPUTS) -> Cell:
    return list_cells(suite(text), inputs)[0]


def record(correct: int, loss: float = 1.0, status: str = "done") -> dict[str, Any]:
    return {"status": status, "correct": correct, "problems": 100, "loss": [loss] * 20}


def sweep(of: Cell, scores: dict[float, int]) -> Records:
    return {of.spec("sweep", rate, 100).key: record(right) for rate, right in scores.items()}


def rates(runs: list[RunSpec]) -> list[float]:
    return [run.rate for run in runs]


def test_the_sweep_comes_first() -> None:
    choice, missing = choose_rate(cell(), {})
    assert choice.rate is None
    assert [(run.stage, run.rate, run.seed) for run in missing] == [("sweep", r, 100) for r in (1.0, 2.0, 4.0)]


def test_a_best_rate_inside_the_grid_is_taken() -> None:
    one = cell()
    choice, missing = choose_rate(one, sweep(one, {1.0: 10, 2.0: 30, 4.0: 20}))
    assert (choice.rate, choice.at_edge, missing) == (2.0, False, [])
    assert choice.scores == {1.0: 0.1, 2.0: 0.3, 4.0: 0.2}


def test_a_best_rate_at_the_edge_extends_the_grid_until_it_is_inside() -> None:
    one = cell()
    scores = {1.0: 10, 2.0: 20, 4.0: 30}
    choice, missing = choose_rate(one, sweep(one, scores))
    assert choice.rate is None
    assert rates(missing) == [8.0]
    choice, missing = choose_rate(one, sweep(one, scores | {8.0: 25}))
    assert (choice.rate, choice.at_edge, missing) == (4.0, False, [])


def test_the_grid_is_extended_at_most_so_often_and_the_edge_is_told() -> None:
    one = cell()
    scores = {1.0: 10, 2.0: 20, 4.0: 30, 8.0: 40}
    assert rates(choose_rate(one, sweep(one, scores))[1]) == [16.0]
    choice, missing = choose_rate(one, sweep(one, scores | {16.0: 50}))
    assert (choice.rate, choice.at_edge, missing) == (16.0, True, [])


def test_both_edges() -> None:
    assert extend((1.0, 2.0, 4.0), 1.0) == (0.5, 1.0, 2.0, 4.0)
    assert extend((1.0, 3.0), 3.0) == (1.0, 3.0, 9.0)


def test_equal_accuracy_is_decided_by_the_training_loss() -> None:
    one = cell()
    records = {one.spec("sweep", rate, 100).key: record(0, loss) for rate, loss in ((1.0, 3.0), (2.0, 1.0), (4.0, 2.0))}
    assert choose_rate(one, records)[0].rate == 2.0


def test_diverged_runs_count_as_zero_and_failed_ones_do_not_count() -> None:
    one = cell()
    keys = {rate: one.spec("sweep", rate, 100).key for rate in (1.0, 2.0, 4.0)}
    failed = {"status": "failed", "error": "no"}
    diverged = record(90, status="diverged")
    choice, _ = choose_rate(one, {keys[1.0]: record(1), keys[2.0]: record(5), keys[4.0]: diverged})
    assert choice.rate == 2.0
    choice, _ = choose_rate(one, {keys[1.0]: failed, keys[2.0]: record(5), keys[4.0]: record(3)})
    assert choice.rate == 2.0
    choice, missing = choose_rate(one, dict.fromkeys(keys.values(), failed))
    assert (choice.rate, choice.failed, missing) == (None, True, [])


def test_a_single_rate_is_taken_as_told() -> None:
    one = list_cells(suite(), INPUTS)[2]
    choice, missing = choose_rate(one, sweep(one, {1.0: 10}))
    assert (choice.rate, choice.at_edge, missing) == (1.0, False, [])


def test_order_is_priority_then_sweeps_then_seeds_over_all_cells() -> None:
    cells = list_cells(suite(), INPUTS)
    runs = next_runs(cells, {})
    assert [(r.method, r.dataset) for r in runs] == [("first", "math")] * 3 + [("first", "code")] * 3 + [
        ("second", "code")
    ]
    records = sweep(cells[0], {1.0: 1, 2.0: 3, 4.0: 2}) | sweep(cells[1], {1.0: 1, 2.0: 3, 4.0: 2})
    runs = next_runs(cells, records)
    assert [(r.stage, r.method, r.dataset, r.seed) for r in runs] == [
        ("final", "first", "math", 0),
        ("final", "first", "code", 0),
        ("final", "first", "math", 1),
        ("final", "first", "code", 1),
        ("sweep", "second", "code", 100),
    ]
    records |= {run.key: record(1) for run in runs}
    runs = next_runs(cells, records)
    records |= {run.key: record(1) for run in runs}
    assert next_runs(cells, records) == []


def test_a_run_is_filed_under_everything_that_determines_it() -> None:
    key = cell().spec("final", 2.0, 0).key
    assert cell().spec("final", 2.0, 0).key == key
    assert len({cell().spec("final", rate, seed).key for rate in (1.0, 2.0) for seed in (0, 1)}) == 4
    assert cell().spec("sweep", 2.0, 0).key != key
    # Rates, seeds, priorities and names say which runs there are, and change none.
    same = TEXT.replace("[1.0, 2.0, 4.0]", "[2.0]").replace("seeds = [0, 1]", "seeds = [0]").replace("first", "other")
    assert cell(same).spec("final", 2.0, 0).key == key
    for old, new in (
        ("steps = 20", "steps = 21"),
        ("steps = 20", "steps = 20\nbatch_size = 4"),
        ("[protocol]", "[protocol]\ntest = 10"),
        ("[protocol]", "[protocol]\nmax_new_tokens = 10"),
        ('method = "lora"', 'method = "dora"'),
        ('method = "lora"', 'method = "lora"\nrank = 2'),
        ('method = "lora"', 'method = "lora"\nadapt = { modules = ["q_proj"] }'),
    ):
        assert cell(TEXT.replace(old, new, 1)).spec("final", 2.0, 0).key != key, new
    for inputs in (
        RunInputs("other", INPUTS.data, INPUTS.versions, "cpu"),
        RunInputs("base", {"math": "x", "code": "c"}, INPUTS.versions, "cpu"),
        RunInputs("base", INPUTS.data, {"torch": "2"}, "cpu"),
        RunInputs("base", INPUTS.data, INPUTS.versions, "cuda"),
    ):
        assert cell(inputs=inputs).spec("final", 2.0, 0).key != key


@pytest.mark.parametrize("validation", [10, 20])
def test_validation_problems_do_not_change_the_results(validation: int) -> None:
    text = TEXT.replace("[protocol]", f"[protocol]\nvalidation = {validation}")
    assert cell(text).spec("final", 2.0, 0).key == cell().spec("final", 2.0, 0).key
    assert cell(text).spec("sweep", 2.0, 0).key != cell().spec("sweep", 2.0, 0).key
