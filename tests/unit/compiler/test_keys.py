"""Which change reruns which stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soka_serve.compiler.context import prepare
from soka_serve.compiler.keys import InputHashes, stage_keys
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import read_manifest
from soka_serve.manifest.rules import LLAMA_PROJECTIONS
from soka_serve.manifest.schema import Manifest

INPUTS = InputHashes(base="b", config="c", tokenizer="t", data="d", finetuned={}, base_name="n", manifest="m")
BFLOAT16 = {"output__merged_dtype": "bfloat16"}
MODULES = ["model.layers.0.self_attn.q_proj"]


def _manifest(**change: Any) -> Manifest:
    tables: dict[str, Any] = {
        "schema": 1,
        "base": {"builtin": "tiny"},
        "adapt": [{"init": "weights", "calibration_batches": 0}],
        "train": {"steps": 3, "data": {"builtin": "math"}},
        "output": {"write": ["adapter", "merged"]},
    }
    for dotted, value in change.items():
        table, key = dotted.split("__")
        place = tables[table][0] if table == "adapt" else tables.setdefault(table, {})
        place[key] = value
    return Manifest.model_validate(tables)


@pytest.mark.parametrize(
    ("change", "reruns"),
    [
        ({"train__log_every": 3}, {"report"}),
        ({"train__save_every": 7}, {"report"}),
        ({"serve__port": 9000}, {"report"}),
        ({"output__report": False}, {"report"}),
        ({"output__merged_dtype": "bfloat16"}, {"merge", "report"}),
        ({"output__adapter_dtype": "bfloat16"}, {"export", "merge", "check", "report"}),
        ({"output__adapter_terms": "trained"}, {"export", "merge", "check", "report"}),
        ({"output__adapter_terms": 0.99}, {"export", "merge", "check", "report"}),
        ({"eval__limit": 5}, {"check", "report"}),
        ({"train__learning_rate": 1.0}, {"tune", "export", "merge", "check", "report"}),
        ({"train__max_length": 64}, {"tune", "export", "merge", "check", "report"}),
        ({"train__seed": 1}, {"init", "tune", "export", "merge", "check", "report"}),
        ({"adapt__components": "minor"}, {"init", "tune", "export", "merge", "check", "report"}),
        ({"adapt__rank": {"policy": "fixed", "rank": 2}}, {"init", "tune", "export", "merge", "check", "report"}),
    ],
)
def test_a_change_reruns_what_depends_on_it(change: dict[str, Any], reruns: set[str]) -> None:
    before = stage_keys(_manifest(), INPUTS, MODULES)
    after = stage_keys(_manifest(**change), replace(INPUTS, manifest="changed"), MODULES)
    assert {stage for stage in before if before[stage] != after[stage]} == reruns


@pytest.mark.parametrize("start", [{}, {"adapt__calibration_batches": 2}], ids=["plain", "calibrated"])
def test_an_evaluation_set_counts_for_training_where_training_looks_at_it(start: dict[str, Any]) -> None:
    one, other = (replace(INPUTS, data=data, training="rows") for data in ("d", "e"))
    for more, trained in (({}, False), ({"train__eval_every": 1}, True), ({"train__answered": 2}, True)):
        if "train__answered" in more:
            more = {**more, "train__eval_every": 1, "train__early_stopping": 1}
        before, after = (stage_keys(_manifest(**start, **more), inputs, MODULES) for inputs in (one, other))
        assert before["init"] == after["init"]
        assert (before["tune"] != after["tune"]) == trained
        assert before["check"] != after["check"]


@pytest.mark.parametrize("method", ["soka", "full"])
def test_a_rank_that_nothing_reads_reruns_nothing(method: str) -> None:
    before, after = (
        stage_keys(_manifest(train__method=method, **more), INPUTS, MODULES) for more in ({}, {"train__method_rank": 7})
    )
    assert before == after


def test_the_merged_model_is_what_is_checked_where_there_is_no_adapter() -> None:
    for method, reruns in (("full", {"merge", "check", "measure", "report"}), ("lora", {"merge", "report"})):
        made = {"train__method": method, "output__measure": ["intruders"]}
        before, after = (stage_keys(_manifest(**made, **more), INPUTS, MODULES) for more in ({}, BFLOAT16))
        assert {stage for stage in before if before[stage] != after[stage]} == reruns


@pytest.mark.parametrize("template", ["", "{{ prompt }}"])
@pytest.mark.parametrize("key", ["prompt", "completion"])
def test_problems_that_templates_ask_are_asked_anew(key: str, template: str) -> None:
    """An empty template is one: with the hashes alone the key would be that of the family's own prompts."""
    plain, asked = (
        stage_keys(_manifest(train__data={"builtin": "math"} | more), INPUTS, MODULES) for more in ({}, {key: template})
    )
    assert plain["check"] != asked["check"]
    assert plain["tune"] == asked["tune"]  # which asks none


def test_what_training_does_anew_with_a_key_reruns_builds_that_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [_manifest(), _manifest(train__prune={"threshold": 0.1})]
    before = [stage_keys(manifest, INPUTS, MODULES)["tune"] for manifest in made]
    monkeypatch.setattr("soka_serve.compiler.keys._TRAIN_VERSIONS", {"prune": 99})
    after = [stage_keys(manifest, INPUTS, MODULES)["tune"] for manifest in made]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_data_counts_for_the_initialisation_only_where_it_is_looked_at() -> None:
    other = replace(INPUTS, data="other")
    plain, gradient = _manifest(), _manifest(adapt__init="gradient")
    default = _manifest(adapt__calibration_batches=None)
    assert stage_keys(default, INPUTS, MODULES)["init"] != stage_keys(default, other, MODULES)["init"]
    assert stage_keys(plain, INPUTS, MODULES)["init"] == stage_keys(plain, other, MODULES)["init"]
    assert stage_keys(plain, INPUTS, MODULES)["tune"] != stage_keys(plain, other, MODULES)["tune"]
    assert stage_keys(gradient, INPUTS, MODULES)["init"] != stage_keys(gradient, other, MODULES)["init"]


@pytest.mark.parametrize("changed", ["config", "tokenizer"])
def test_the_bases_config_and_tokenizer_count(changed: str) -> None:
    for manifest, spared in ((_manifest(), {"init"}), (_manifest(adapt__init="gradient"), set())):
        before, after = (stage_keys(manifest, i, MODULES) for i in (INPUTS, replace(INPUTS, **{changed: "other"})))
        assert {stage for stage in before if before[stage] == after[stage]} == spared


def test_a_base_that_was_moved_reruns_only_the_papers_that_name_it() -> None:
    before, after = (stage_keys(_manifest(), i, MODULES) for i in (INPUTS, replace(INPUTS, base_name="moved")))
    assert [stage for stage in before if before[stage] != after[stage]] == ["report"]


def test_a_finetuned_checkpoint_that_was_moved_is_the_same() -> None:
    def keys(place: str, digest: str) -> dict[str, str]:
        manifest = _manifest(adapt__init="delta", adapt__finetuned=place)
        return stage_keys(manifest, replace(INPUTS, finetuned={place: digest}), MODULES)

    assert keys("a", "x") == keys("b", "x")
    assert keys("a", "x")["init"] != keys("a", "y")["init"]


def test_caches_of_factors_that_weight_decay_pulled_to_zero_are_not_taken() -> None:
    for method, before in (("soka", "52ead5321f76a6a0"), ("lora", "842cda8c5337e30c")):
        keys = stage_keys(_manifest(train__method=method, train__weight_decay=0.1), INPUTS, MODULES)
        assert (keys["tune"] != before) == (method == "soka")


MIXES = [
    (("weights", "zero"), True),
    (("truncated", "zero"), True),
    (("weights", "truncated"), False),
    (("weights", "weights"), False),
    (("random", "zero"), True),
    (("zero", "zero"), False),
]


@pytest.mark.parametrize(("inits", "again"), MIXES)
def test_decay_beside_subtracted_starts_is_trained_again(tmp_path: Path, inits: tuple[str, str], again: bool) -> None:
    """Modules that are not subtracted were pulled to their starting factors where others were."""
    rules = (f'[[adapt]]\nmodules = ["{n}"]\ninit = "{i}"\n' for n, i in zip(("q_proj", "k_proj"), inits, strict=True))
    text = 'schema = 1\n[base]\nbuiltin = "tiny"\n' + "".join(rules) + "[train]\nsteps = 3\n"

    def tune(more: str) -> tuple[str, str]:
        """The key, and the one that it had."""
        (tmp_path / "m.toml").write_text(f'{text}{more}data = {{ builtin = "math" }}\n')
        loaded = read_manifest(tmp_path / "m.toml")
        context = prepare(loaded, Workspace(tmp_path, "m"), progress=False)
        names = [t.module.name for t in context.targets]
        return context.keys["tune"], stage_keys(loaded.manifest, context.inputs, names)["tune"]

    now, before = tune("weight_decay = 0.1\n")
    assert (now != before) == again
    now, before = tune("")
    assert now == before


def test_other_weights_or_modules_rerun_everything() -> None:
    keys = stage_keys(_manifest(), INPUTS, MODULES)
    for others in (
        stage_keys(_manifest(), replace(INPUTS, base="b2"), MODULES),
        stage_keys(_manifest(), INPUTS, [*MODULES, "model.layers.1.self_attn.q_proj"]),
    ):
        assert all(keys[stage] != others[stage] for stage in keys)


def test_baselines_have_no_initialisation_and_full_has_a_merge() -> None:
    assert "init" not in stage_keys(_manifest(train__method="lora"), INPUTS, MODULES)
    only_adapter = _manifest(train__method="full", output__write=["adapter"])
    assert "merge" in stage_keys(only_adapter, INPUTS, MODULES)


def test_every_module_of_a_llama_is_the_list_of_its_projections() -> None:
    """Caches of builds that had the list as the default stay good; elsewhere '*' is a rule of its own."""
    written = _manifest(adapt__modules=list(LLAMA_PROJECTIONS))
    other = [*MODULES, "model.layers.0.self_attn.qkv_proj"]
    assert stage_keys(_manifest(), INPUTS, MODULES) == stage_keys(written, INPUTS, MODULES)
    assert stage_keys(_manifest(), INPUTS, other)["init"] != stage_keys(written, INPUTS, other)["init"]


# What builds of the shipped manifests have in their soka.lock: another key here throws away every user's caches.
KEYS = {
    "math": {"init": "fb66de69ba20ab30", "tune": "8bae758b6450d94d", "export": "433b490fc3e1a5f5"},
    "code": {"init": "eb8e70ddb540f2ab", "tune": "fe93d0526c8c22b7", "export": "8b41eba7ccb9b0dc"},
}


@pytest.mark.parametrize("name", KEYS)
def test_builds_of_before_are_taken(root: Path, tmp_path: Path, name: str) -> None:
    """The data's hash holds the files that generate it, so those count, too."""
    context = prepare(read_manifest(root / "manifests" / f"{name}.toml"), Workspace(tmp_path, name), progress=False)
    assert {stage: context.keys[stage] for stage in KEYS[name]} == KEYS[name]
