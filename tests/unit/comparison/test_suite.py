"""Comparison suites: what a file may say, and what is said about one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from soka_serve.comparison.preview import preview
from soka_serve.comparison.suite import manifest_of, parse_suite, read_suite
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
