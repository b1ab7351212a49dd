"""Comparison suites: what a file may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eval.suites.prepare import split_mbpp
from soka_serve.builtin import base_directory
from soka_serve.comparison import inputs as inputs_module
from soka_serve.comparison.cluster import _differences
from soka_serve.comparison.compare import compare
from soka_serve.comparison.plan import list_cells, runs_per_cell
from soka_serve.comparison.pool import next_runs
from soka_serve.comparison.preview import preview
from soka_serve.comparison.read import LoadedSuite, parse_suite, read_suite
from soka_serve.comparison.settings import manifest_of
from soka_serve.errors import BuildError, ManifestError
from soka_serve.manifest.read import parse_manifest
from tests.support.suites import GOOD, INPUTS, TEXT

SUITES = Path(__file__).resolve().parents[3] / "eval" / "suites"

CLAIM = '[[claim]]\ncandidate = "b"\nreference = "a"\nprimary = true\n'


def problems(text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_suite(text, "s.toml")
    return str(caught.value)


def preview_text(text: str) -> str:
    return preview(LoadedSuite(parse_suite(text, "s.toml"), Path("s.toml"), Path(), text, "")).to_text()


def test_a_suite_and_its_defaults() -> None:
    suite = parse_suite(GOOD, "s.toml")
    assert suite.method[0].grid == {"learning_rate": (1e-3, 4e-3), "scale": (1.0, 2.0)}  # in order
    assert suite.protocol.seeds == (0, 1, 2, 3, 4)
    assert suite.settings == 3  # one pass over the larger grid, and as many for the other method
    assert runs_per_cell(suite) == (9, 5)


def test_the_manifest_of_a_run_has_the_setting_the_rule_and_the_shared_recipe() -> None:
    suite = parse_suite(GOOD, "s.toml")
    setting = (("learning_rate", 1e-2), ("train.sigma_lr", 0.5))
    manifest = manifest_of(suite, suite.contender("b"), suite.dataset[0], setting=setting, seed=7)
    assert (manifest.train.method, manifest.train.learning_rate, manifest.train.seed) == ("soka", 1e-2, 7)
    assert (manifest.train.steps, manifest.train.batch_size, manifest.train.sigma_lr) == (3, 8, 0.5)
    assert manifest.adapt == (suite.contender("b").adapt,)
    lora = manifest_of(suite, suite.contender("a"), suite.dataset[0], setting=(("scale", 2.0), ("clip", 1.5)), seed=7)
    assert (lora.train.method_scale, lora.train.clip) == (2.0, 1.5)
    ranked = GOOD.replace('"train.sigma_lr" = [0.5]', '"adapt.rank.rank" = [2, 4]')
    suite = parse_suite(ranked, "s.toml")
    made = manifest_of(suite, suite.contender("b"), suite.dataset[0], setting=(("adapt.rank.rank", 4),), seed=0)
    assert made.adapt[0].rank.rank == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 3", "stepz = 3", "s.toml:7:1: train.stepz: unknown key (did you mean 'steps'?)"),
        ("steps = 3", "", "train.steps: required, but missing"),
        ("steps = 3", "steps = 3\nlearning_rate = 1e-3", "train.learning_rate: unknown key"),
        ('method = "lora"', 'method = "LoRA"', "(did you mean 'lora'?)"),
        ("[1e-2, 2e-2]", "[0.0, 1.0]", "sets train.learning_rate, which does not take 0"),
        ("[1e-2, 2e-2]", "[1e-2, 1e-2]", "a value is written twice"),
        ("[1e-2, 2e-2]", "[]", "method[1].grid.learning_rate: expected an array"),
        ("[1e-2, 2e-2]", "[1e-2]", "other methods have a choice: give an axis a second value"),
        ('"train.sigma_lr"', '"train.sigma"', "s.toml:18:56: method[1].grid"),
        ('"train.sigma_lr"', '"train.sigma"', "sets train.sigma, and manifests have no such key"),
        ('"train.sigma_lr" = [0.5]', '"train.warmup_frac" = [0.5, 2.0]', "train.warmup_frac, which does not take 2: "),
        ('"train.sigma_lr"', '"train.steps"', "expected learning_rate, clip, scale, or a key of [train] or [[adapt]]"),
        ('"train.sigma_lr"', '"rate"', "expected learning_rate, clip, scale, or a key of [train] or [[adapt]]"),
        ('"train.sigma_lr"', '"train.log_every"', "expected learning_rate, clip, scale, or a key of [train]"),
        ("scale =", '"train.left_lr" =', "sets train.left_lr, which method = 'lora' does not read"),
        ("scale =", '"train.regularise.sorsa" =', "sorsa belongs to method = 'soka'; the method is 'lora'"),
        ("scale =", '"adapt.scale" =', "sets adapt.scale, which method = 'lora' does not read"),
        ('"train.sigma_lr"', '"train.method_scale"', "sets train.method_scale, which method = 'soka' does not read"),
        ("scale =", '"train.learning_rate" =', "sets train.learning_rate, as learning_rate does"),
        (
            "scale = [1.0, 2.0]",
            'clip = [2.0, 3.0], "train.max_grad_norm" = [1.0]',
            "its 1 does not go with clip = 2: max_grad_norm and clip exclude each other",
        ),
        ('method = "lora"', 'method = "full"', "scale does not go with method = 'full'"),
        ("adapt =", "rank = 2\nadapt =", "rank does not go with method = 'soka'"),
        ('method = "lora"', 'method = "lora"\ncalibration_batches = 2', "calibration_batches belongs to corda and eva"),
        ('name = "b"', 'name = "a"', 'method[1].name: "a" is the name of another method already'),
        ("adapt =", 'datasets = ["x"]\nadapt =', 'no dataset is called "x"; there are math'),
        ("steps = 3", "steps = 3\n[protocol]\nsweep_seeds = [4]", "4 stands in seeds too"),
        ("steps = 3", "steps = 3\n[protocol]\nsettings = 2\nfinalists = 3", "finalists is larger than settings"),
        ("steps = 3", "steps = 3\n[protocol]\nfinalists = 4", "finalists is larger than settings (3, the default)"),
        ("steps = 3", "steps = 3\n[protocol]\nanswered = 201", "answered is larger than test (200, the default)"),
        ('{ builtin = "math" }', '{ builtin = "math" }\nanswers = "boxed"', "builtin families have their own"),
        ('{ builtin = "math" }', '{ jsonl = "x.jsonl" }\ntest_seed = 2', "test_seed belongs to builtin families"),
        ('{ builtin = "math" }', '{ jsonl = "x.jsonl" }', "answers is required for data of your own"),
        ('{ builtin = "math" }', '{ jsonl = "x.jsonl" }\nanswers = "exact"', "a comparison needs evaluation data"),
        ("schema = 1", "schema = true", "schema: expected the integer 1; got true"),
        ('init = "random"', 'init = "random", calibration_batches = 2', "nothing is decomposed"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in problems(GOOD.replace(old, new, 1))


def test_regularisers_are_axes() -> None:
    """Zero is none of it, in the dump too that goes into the records' keys."""
    suite = parse_suite(GOOD.replace('"train.sigma_lr" = [0.5]', '"train.regularise.protect" = [0, 2]'), "s.toml")
    made = [
        manifest_of(suite, suite.method[1], suite.dataset[0], setting=(("train.regularise.protect", count),), seed=0)
        for count in (0, 2)
    ]
    assert [m.train.regularise.chosen for m in made] == [{}, {"protect": 2}]
    assert "regularise" not in made[0].train.model_dump()
    assert made[1].train.model_dump()["regularise"] == {"protect": 2}


def test_an_optimiser_that_a_method_would_not_take_is_refused() -> None:
    text = GOOD.replace("steps = 3", 'steps = 3\noptimiser = "adafactor"')
    parse_suite(text, "s.toml")
    assert "s.toml:8:13: train.optimiser: a is trained with AdamW" in problems(text.replace('"lora"', '"cdka"'))


WORDS = GOOD.replace('method = "soka"', 'method = "soka"\ntrain = { optimiser = "adafactor" }')


def test_a_methods_own_words_are_its_alone() -> None:
    suite = parse_suite(WORDS, "s.toml")
    made = [manifest_of(suite, m, suite.dataset[0], setting=(), seed=0).train.optimiser for m in suite.method]
    assert made == ["adamw", "adafactor"]
    runs = [next_runs(list_cells(parse_suite(text, "s"), INPUTS), {}) for text in (GOOD, WORDS)]
    equal = {run.method: run.key == other.key for run, other in zip(*runs, strict=True)}
    assert equal == {"a": True, "b": False}
    assert "learning_rate 0.01, 0.02; train.sigma_lr 0.5; optimiser adafactor" in preview_text(WORDS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("adafactor", "lomo", "s.toml:18:23: method[1].train.optimiser: the Trainer's lomo is refused"),
        ("adafactor", "galore_adamw", "s.toml:18:23: method[1].train.optimiser: galore_adamw projects gradients"),
        ('"soka"', '"cdka"', "s.toml:18:23: method[1].train.optimiser: b is trained with AdamW"),
        ("optimiser", "steps", "s.toml:18:11: method[1].train.steps: unknown key"),
        (
            'optimiser = "adafactor"',
            'weight_decay_schedule = "linear"',
            "s.toml:18:35: method[1].train.weight_decay_schedule: weight_decay_schedule belongs to weight_decay",
        ),
    ],
)
def test_words_that_do_not_go_with_the_method(old: str, new: str, message: str) -> None:
    text = WORDS.replace("adapt = { init", "# adapt = { init").replace(', "train.sigma_lr" = [0.5]', "")
    parse_suite(text, "s.toml")
    assert message in problems(text.replace(old, new))


def test_a_borrowed_recipe_is_not_named() -> None:
    text = GOOD.replace('method = "lora"', 'method = "osf"\ntrain = { optimiser = "galore_adamw" }').replace(
        ", scale = [1.0, 2.0]", ""
    )
    assert "it belongs to method = 'full'; the method is 'osf'" in problems(text)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('"train.prune.threshold" = [0.1]', 'grid."train.prune.threshold": prune does not go with optimiser'),
        ('"train.regularise.orthogonalise" = [0, 10], "train.left_lr" = [0]', "orthogonalise"),
    ],
)
def test_axes_that_do_not_go_with_words(grid: str, message: str) -> None:
    text = WORDS.replace("adapt = { init", "# adapt = { init").replace('"train.sigma_lr" = [0.5]', grid)
    assert message in problems(text)


@pytest.mark.parametrize(
    ("recipe", "words", "grid"),
    [
        ('optimiser = "sgd"', 'optimiser = "adamw"', ""),
        ('optimiser = "adafactor"', 'optimiser = "adamw"', ', "train.prune.threshold" = [0.1]'),
        ('weight_decay_schedule = "linear"', 'weight_decay_schedule = "constant"', ""),
        ('weight_decay_schedule = "linear"', 'schedule = "linear"', ', "train.weight_decay" = [0.1, 0.2]'),
    ],
)
def test_words_stand_in_the_place_of_the_recipes(recipe: str, words: str, grid: str) -> None:
    head, _, rest = GOOD.partition("[[method]]")
    text = (head + rest[rest.index("[[method]]") :]).replace("steps = 3", f"steps = 3\n{recipe}")
    text = text.replace('method = "soka"', f'method = "soka"\ntrain = {{ {words} }}')
    suite = parse_suite(text.replace(', "train.sigma_lr" = [0.5]', grid), "s.toml")
    assert next_runs(list_cells(suite, INPUTS), {})


def test_words_that_need_an_axis() -> None:
    text = GOOD.replace('method = "soka"', 'method = "soka"\ntrain = { weight_decay_schedule = "linear" }')
    text = text.replace('"train.sigma_lr" = [0.5]', '"train.weight_decay" = [0.1, 0.2]')
    assert "train.weight_decay 0.1, 0.2; weight_decay_schedule linear" in preview_text(text)


def test_a_missing_package_is_said_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.toml"
    file.write_text(WORDS.replace("adafactor", "adamw_8bit"))
    monkeypatch.setattr(inputs_module, "installed", lambda package: None)
    with pytest.raises(BuildError, match=r"s\.toml:18:23: method\[1\].* needs the package bitsandbytes, which is not"):
        compare(file, work=tmp_path / "work", progress=False)
    monkeypatch.undo()
    file.write_text(WORDS.replace("adafactor", "paged_adamw_8bit"))
    with pytest.raises(BuildError, match='"paged_adamw_8bit" needs a GPU, and there is none'):
        compare(file, work=tmp_path / "work", progress=False)
    assert not list(tmp_path.rglob("records/*"))


def test_another_machines_package_is_told() -> None:
    here, there = (replace(INPUTS, packages={"bitsandbytes": version}) for version in ("not installed", "0.50.2"))
    assert list(_differences(here, there)) == ["it has bitsandbytes not installed instead of 0.50.2"]


@pytest.mark.parametrize(("text", "counts"), [(GOOD, False), (WORDS.replace("adafactor", "lion_32bit"), True)])
def test_the_version_of_a_package_counts_where_it_is_used(text: str, counts: bool) -> None:
    keys = [
        next_runs(list_cells(parse_suite(text, "s"), replace(INPUTS, packages={"bitsandbytes": version})), {})[-1].key
        for version in ("1", "2")
    ]
    assert (keys[0] != keys[1]) == counts


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"b"', '"z"', 'claim[0].candidate: no method is called "z"; there are a, b'),
        ("primary = true", "", "exactly one claim is the primary one"),
        ("primary = true\n", 'primary = true\ndataset = "code"\n', 'no dataset is called "code"'),
        ("primary", 'relation = "no worse"\nprimary', "relation = 'no worse' needs a margin above 0"),
        ("primary", "margin = 0.1\nprimary", "'better' has none"),
        ("primary", 'metric = "forgetting"\nprimary', "forgetting needs [[other]] texts"),
        (
            "primary",
            'metric = "accuracy"\npairs = "examples"\nprimary',
            "'answer_loss' or 'forgetting' is measured per example",
        ),
        ("primary", 'metric = "steps_to_loss"\nprimary', "steps_to_loss needs loss_targets in each [[dataset]]"),
        (
            "primary = true\n",
            'metric = "accuracy"\nprimary = true\n[protocol]\nanswered = 0\n',
            "accuracy needs answers, and protocol.answered is 0",
        ),
        ("primary = true\n", "primary = true\n[protocol]\nseeds = [0, 1]\n", "2 seeds cannot show anything at 5%"),
    ],
)
def test_claims_that_cannot_be_tested_are_refused(old: str, new: str, message: str) -> None:
    parse_suite(GOOD + CLAIM, "s.toml")
    assert message in problems(GOOD + CLAIM.replace(old, new, 1))


def test_a_claim_on_a_dataset_that_a_method_does_not_run_on_is_refused() -> None:
    claim = '[[claim]]\ncandidate = "second"\nreference = "first"\npairs = "examples"\nprimary = true\n'
    assert "claim[0].candidate: second does not run on math" in problems(TEXT + claim)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    text = GOOD.replace("steps = 3", "stepz = 3").replace('"lora"', '"lara"').replace("[1e-2, 2e-2]", "[-1.0]")
    assert {line.split(": ")[1] for line in problems(text).splitlines()} >= {"train.stepz", "method[0].method"}


def test_manifests_are_still_explained_as_manifests() -> None:
    problems(GOOD.replace("steps = 3", "stepz = 3"))
    with pytest.raises(ManifestError, match="unknown key"):
        parse_manifest(GOOD, "m.toml")


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_can_be_planned(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = read_suite(file).suite
    assert sum(claim.primary for claim in suite.claim) == 1
    (tmp_path / "smollm2").symlink_to(base_directory())  # in place of a model of the user's
    made = preview(file, tmp_path)
    assert set(made.parameters) == {m.name for m in suite.method}
    assert all(0 < low <= high <= made.base_parameters for low, high in made.parameters.values())
    assert " runs; " in made.to_text()


def test_tasks_of_mbpp_that_stand_in_the_test_are_not_trained_on() -> None:
    tasks = [(10, "prompt"), (11, "a"), (510, "b"), (511, "c"), (601, "d"), (602, "a"), (974, "e")]
    train, test = split_mbpp([{"task_id": number, "text": text, "code": "x\r\n"} for number, text in tasks])
    assert [row["task_id"] for row in test] == [11, 510]
    assert [(row["task_id"], row["code"]) for row in train] == [(601, "x\n"), (974, "x\n")]
