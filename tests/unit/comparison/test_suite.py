"""Comparison suites: what a file may say; which runs it has, what they are filed under, and which come next."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.suites.prepare import split_mbpp
from soka_serve.adapter.format import write_adapter
from soka_serve.builtin import base_directory
from soka_serve.comparison import inputs as inputs_module
from soka_serve.comparison.cluster import _differences
from soka_serve.comparison.compare import compare
from soka_serve.comparison.inputs import read_inputs
from soka_serve.comparison.plan import Cell, RunInputs, list_cells, runs_per_cell
from soka_serve.comparison.pool import next_runs
from soka_serve.comparison.preview import preview
from soka_serve.comparison.read import LoadedSuite, parse_suite, read_suite
from soka_serve.comparison.records import keys_of, progress_of, run_keys
from soka_serve.comparison.settings import Setting, manifest_of
from soka_serve.comparison.sweep import choose, seeds_that_agree
from soka_serve.errors import BuildError, CheckpointError, ManifestError
from soka_serve.io.workspace import HashCache, Workspace
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.read import parse_manifest
from tests.support.kron_oracle import draw_factors

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
grid = { learning_rate = [4e-3, 1e-3], scale = [1.0, 2.0] }
[[method]]
name = "b"
method = "soka"
grid = { learning_rate = [1e-2, 2e-2], "train.sigma_lr" = [0.5] }
adapt = { init = "random", rank = { policy = "fixed", rank = 2 } }
"""
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
    with pytest.raises(BuildError, match="'paged_adamw_8bit' needs a GPU, and there is none"):
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
sweep_seeds = [100]
settings = 5
[[dataset]]
name = "math"
data = { builtin = "math" }
[[dataset]]
name = "code"
data = { builtin = "code" }
[[method]]
name = "first"
method = "lora"
grid = { learning_rate = [1.0, 2.0, 4.0], scale = [1.0, 2.0] }
[[method]]
name = "second"
method = "soka"
grid = { learning_rate = [1.0, 2.0] }
priority = 2
datasets = ["code"]
"""
INPUTS = RunInputs("base", "papers", {"math": "m", "code": "c"}, {}, {"torch": "1"}, "cpu")
START: Setting = (("learning_rate", 2.0), ("scale", 2.0))

Records = dict[str, dict[str, Any]]


def cells_of(text: str = TEXT, inputs: RunInputs = INPUTS) -> list[Cell]:
    return list_cells(parse_suite(text, "s.toml"), inputs)


def record(loss: float, status: str = "done", right: int = 0, answered: int = 0) -> dict[str, Any]:
    return {"status": status, "answered": answered, "correct": right, "answer_loss": [loss]}


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


def test_keys_of_records_stay() -> None:
    """Records are kept for months: a key that is added to manifests must not make them another run's at its default."""
    first, *_, second = cells_of(TEXT.replace('builtin = "tiny"', 'path = "base"\ndtype = "float32"'))
    runs = ((first, START), (second, START[:1]))
    keys = [cell.spec(stage, setting, 0).key for cell, setting in runs for stage in ("sweep", "final")]
    assert keys == [
        "c8d3d24e13a4796d41d8a759",
        "0ded26ef23f81f5de22cead4",
        "7c3ad8b2586ed6846e9afbbc",
        "905a81c221b66507d13b16ee",
    ]


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


def test_a_run_is_filed_under_everything_that_determines_it() -> None:
    def key(text: str = TEXT, inputs: RunInputs = INPUTS, stage: Any = "final") -> str:
        return cells_of(text, inputs)[0].spec(stage, START, 0).key

    assert key() == key()
    cell = cells_of()[0]
    other = (("learning_rate", 1.0), ("scale", 2.0))
    assert len({cell.spec("final", setting, seed).key for setting in (START, other) for seed in (0, 1)}) == 4
    assert key(stage="sweep") != key()
    # Grids, seeds, priorities, names and how settings are chosen say which runs there are, and change none.
    for old, new in (
        ("[1.0, 2.0, 4.0]", "[2.0, 3.0]"),
        ("seeds = [0, 1]", "seeds = [0]"),
        ("first", "other"),
        ("[protocol]", "[protocol]\nvalidation = 20"),
    ):
        assert key(TEXT.replace(old, new, 1)) == key(), new
    assert key(TEXT.replace("[protocol]", "[protocol]\nvalidation = 20"), stage="sweep") != key(stage="sweep")
    # Fresh test problems are drawn besides the validation problems, where those are more than builds measure by.
    fresh = TEXT.replace("[protocol]", "[protocol]\nvalidation = 20")
    fresh = fresh.replace("[[dataset]]", "[[dataset]]\ntest_seed = 2")
    assert key(fresh.replace("validation = 20", "validation = 30")) == key(fresh)
    assert key(fresh.replace("validation = 20", "validation = 600")) != key(fresh)
    for old, new in (
        ("steps = 20", "steps = 21"),
        ("steps = 20", "steps = 20\nbatch_size = 4"),
        ("[protocol]", "[protocol]\ntest = 10"),
        ("[protocol]", "[protocol]\nanswered = 10"),
        ("[protocol]", "[protocol]\nmax_new_tokens = 10"),
        ('method = "lora"', 'method = "dora"'),
        ('method = "lora"', 'method = "lora"\nrank = 2'),
        ('method = "lora"', 'method = "lora"\nadapt = { modules = ["q_proj"] }'),
        ("[[method]]", '[[other]]\nname = "o"\ndata = { builtin = "code" }\n[[method]]'),
    ):
        inputs = RunInputs(INPUTS.base, INPUTS.papers, INPUTS.data, {"o": "o"}, INPUTS.versions, "cpu")
        assert key(TEXT.replace(old, new, 1), inputs) != key(), new
    for inputs in (
        RunInputs("other", INPUTS.papers, INPUTS.data, {}, INPUTS.versions, "cpu"),
        RunInputs("base", "others", INPUTS.data, {}, INPUTS.versions, "cpu"),
        RunInputs("base", INPUTS.papers, {"math": "x", "code": "c"}, {}, INPUTS.versions, "cpu"),
        RunInputs("base", INPUTS.papers, INPUTS.data, {}, {"torch": "2"}, "cpu"),
        RunInputs("base", INPUTS.papers, INPUTS.data, {}, INPUTS.versions, "cuda"),
    ):
        assert key(inputs=inputs) != key()


def test_what_a_base_is_read_by_is_one_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = shutil.copytree(base_directory(), tmp_path / "base")
    (tmp_path / "s.toml").write_text(GOOD.replace('builtin = "tiny"', 'path = "base"'))
    loaded = read_suite(tmp_path / "s.toml")

    def inputs(folder: str) -> RunInputs:
        workspace = Workspace(tmp_path / folder, "s")
        workspace.cache.mkdir(parents=True)
        return read_inputs(loaded, HashCache(workspace.hashes))

    first = inputs("1")
    for name in ("config.json", "tokenizer.json"):
        before = (base / name).read_text()
        (base / name).write_text(before + "\n")
        found = inputs(name)
        assert (found.base, found.papers != first.papers) == (first.base, True), name
        (base / name).write_text(before)
    assert inputs("2") == first
    # A checkpoint in half precision is held as float32 on some CPUs only.
    monkeypatch.setattr(inputs_module, "has_nvidia_gpu", lambda: False)
    (file,) = base.glob("*.safetensors")
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    devices = set()
    for amx in (True, False):
        monkeypatch.setattr("soka_serve.kron.cpu.has_amx", lambda amx=amx: amx)
        devices.add(inputs(f"amx {amx}").device)
    assert devices == {"cpu with AMX", "cpu without AMX"}


def test_what_a_method_starts_from_is_an_input_by_its_content(tmp_path: Path) -> None:
    """Files that are replaced make other runs, and a folder that was moved does not."""
    shutil.copytree(base_directory(), tmp_path / "tuned")
    for name, digit in (("first", 1.0), ("again", 2.0)):
        factors = draw_factors(FactorShape(2, 4, 64, 32), 2, scale=digit).to(torch.float32)
        write_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": factors}, base_model="tiny")

    def key(rule: str) -> str:
        old = 'init = "random", rank = { policy = "fixed", rank = 2 }'
        text = GOOD.replace(old, rule + ', modules = ["model.layers.0.self_attn.q_proj"]')
        (tmp_path / "s.toml").write_text(text)
        loaded = read_suite(tmp_path / "s.toml")
        workspace = Workspace(tmp_path / "work", "s")
        workspace.cache.mkdir(parents=True, exist_ok=True)
        cell = list_cells(loaded.suite, read_inputs(loaded, HashCache(workspace.hashes)))[1]
        return cell.spec("final", (("learning_rate", 1e-2), ("train.sigma_lr", 0.5)), 0).key

    for kind, start in (("adapter", "adapter"), ("finetuned", "delta")):
        name = {"adapter": "first", "finetuned": "tuned"}[kind]
        before = key(f'init = "{start}", {kind} = "{name}"')
        shutil.move(tmp_path / name, tmp_path / f"moved-{kind}")
        assert key(f'init = "{start}", {kind} = "moved-{kind}"') == before
        if kind == "adapter":
            shutil.move(tmp_path / "again", tmp_path / name)
        else:
            shutil.move(tmp_path / f"moved-{kind}", tmp_path / name)
            (file,) = (tmp_path / name).glob("*.safetensors")
            save_file({k: 2 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        assert key(f'init = "{start}", {kind} = "{name}"') != before
    with pytest.raises(CheckpointError, match=r"s.toml:\d+:\d+: method\[1\].adapt.adapter: .*none: no adapter"):
        key('init = "adapter", adapter = "none"')
    with pytest.raises(BuildError, match=r"adapter: https://host/math may be another adapter at the next run"):
        key('init = "adapter", adapter = "https://host/math"')
