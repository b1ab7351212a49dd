"""Which modules a manifest adapts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from soka_serve.base.base import Base
from soka_serve.base.modules import Module, llama_parameters, modules_from_config
from soka_serve.base.target_modules import budget_groups, parse_layers, resolve_targets
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.manifest.read import read_manifest
from soka_serve.manifest.rules import RankEnergy, RankFixed
from soka_serve.manifest.schema import Manifest
from tests.support.plans import LLAMA2_7B

LLAMA2 = json.loads((LLAMA2_7B / "config.json").read_text())
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def manifest(*rules: dict[str, Any]) -> Manifest:
    values: dict[str, Any] = {"schema": 1, "base": {"builtin": "tiny"}, "train": {"data": {"builtin": "math"}}}
    return Manifest.model_validate(values | ({"adapt": list(rules)} if rules else {}))


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return modules_from_config(LLAMA2)


# ------------------------------------------------------------------------------------------------- modules of a base


def test_config_gives_llama2_projections(modules: list[Module]) -> None:
    assert len(modules) == 32 * 7
    assert modules[0] == Module("model.layers.0.self_attn.q_proj", 4096, 4096, 0, "float16")
    assert modules[-1] == Module("model.layers.31.mlp.down_proj", 4096, 11008, 31, "float16")


def test_config_gives_gqa_widths() -> None:
    config = LLAMA2 | {"intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128}
    shapes = {m.projection: (m.out_features, m.in_features) for m in modules_from_config(config)}
    assert shapes["k_proj"] == shapes["v_proj"] == (1024, 4096)
    assert shapes["gate_proj"] == (14336, 4096)


def test_explicit_head_dim_makes_q_wider_than_hidden() -> None:
    config = LLAMA2 | {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}
    shapes = {m.projection: (m.out_features, m.in_features) for m in modules_from_config(config)}
    assert shapes["q_proj"] == (2048, 1024)
    assert shapes["o_proj"] == (1024, 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_size": None, "num_hidden_layers": "x"}, "hidden_size = None, num_hidden_layers = 'x'"),
        ({"num_attention_heads": 33}, "not a multiple of num_attention_heads 33"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    ],
)
def test_config_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        modules_from_config(LLAMA2 | change)


def write_llama(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """A LLaMA of zeros, one layer, hidden 8, where `changes` does not say otherwise (None takes a tensor out)."""
    values = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 6, "vocab_size": 10}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    shapes = llama_parameters(values, modules_from_config(values))
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values))


def test_headers_give_dtypes_and_what_the_model_does_not_use(tmp_path: Path) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    rope = "model.layers.0.self_attn.rotary_emb.inv_freq"
    mtp = {f"model.layers.1.{name}.weight": torch.zeros(8, 8) for name in ("eh_proj", "self_attn.q_proj")}
    write_llama(tmp_path, {down: torch.zeros(8, 6, dtype=torch.bfloat16), rope: torch.zeros(4), **mtp})
    base = Base(tmp_path).layout
    assert [m.projection for m in base.modules] == list(PROJECTIONS)
    assert base.modules[-1] == Module("model.layers.0.mlp.down_proj", 8, 6, 0, "bfloat16")
    assert base.unused == tuple(mtp)
    assert "2 tensors of 2 modules that the model does not use, such as model.layers.1.eh_proj.weight" in str(
        base.describe_unused()
    )
    assert base.size.parameters == 2 * 80 + 4 * 64 + 3 * 48 + 3 * 8
    assert base.size.weight_bytes == 4 * base.size.parameters - 2 * 48


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", None, "model.layers.0.mlp.up_proj.weight is missing"),
        ("lm_head.weight", None, "lm_head.weight is missing"),
        ("model.norm.weight", torch.zeros(9), r"model.norm.weight is \(9,\), config.json makes it \(8,\)"),
    ],
)
def test_headers_that_do_not_fit_the_config(tmp_path: Path, name: str, tensor: Any, message: str) -> None:
    write_llama(tmp_path, {name: tensor})
    with pytest.raises(CheckpointError, match=message):
        _ = Base(tmp_path).layout


def test_directory_without_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = Base(tmp_path).layout


# --------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", range(8)),
        ("0-3", range(4)),
        ("5", [5]),
        ("4-", [4, 5, 6, 7]),
        ("-3-", [5, 6, 7]),
        ("7-7", [7]),
        ((0, 2, 4), [0, 2, 4]),
    ],
)
def test_layers(text: str | tuple[int, ...], expected: Any) -> None:
    assert parse_layers(text, 8) == set(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-8", "outside the model's 0-7"),
        ("8-", "outside the model's 0-7"),
        ("9", "outside the model's 0-7"),
        ("-9-", "the model has 8"),
        ("-0-", "the model has 8"),
        ("5-3", "backwards"),
        ("-4", "expected 'all'"),
        ("some", "expected 'all'"),
        ((1, 8), r"\[8\] are outside"),
    ],
)
def test_layers_that_are_not_there(text: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_layers(text, 8)


# --------------------------------------------------------------------------------------------------------- targets


def test_default_adapts_every_projection(modules: list[Module]) -> None:
    targets = resolve_targets(manifest(), modules)
    assert [t.module for t in targets] == modules
    assert targets[0].shape == (64, 64, 64, 64)
    assert targets[0].rules == (0,)


def test_attention_rank_1_counted_by_hand(modules: list[Module]) -> None:
    targets = resolve_targets(manifest({"modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}), modules)
    assert len(targets) == 128
    # 64 * 64 + 64 * 64 + 1 for each
    assert {t.shape.parameters(1) for t in targets if t.shape} == {8193}


def test_later_rules_change_only_what_they_set(modules: list[Module]) -> None:
    targets = resolve_targets(
        manifest(
            {"modules": ["q_proj"], "init": "weights", "rank": {"policy": "fixed", "rank": 3}},
            {"modules": ["model.layers.*.q_proj", "*.v_proj"], "layers": "4-5", "shape": "auto"},
            {"modules": ["q_proj"], "layers": [5], "rank": {"policy": "energy"}},
        ),
        modules,
    )
    rules = {(t.module.projection, t.module.layer): t for t in targets}
    assert len(targets) == 32 + 2
    assert rules["q_proj", 0].rule.init == "weights"
    assert rules["q_proj", 0].shape == (64, 64, 64, 64)
    four = rules["q_proj", 4]
    assert (four.rules, four.rule.init, four.rule.rank, four.shape) == ((0, 1), "weights", RankFixed(rank=3), None)
    five = rules["q_proj", 5]
    assert (five.rules, five.rule.init, five.shape) == ((0, 1, 2), "weights", None)
    assert five.rule.rank == RankEnergy(policy="energy")
    assert rules["v_proj", 5].rule.init == "zero"


def test_setting_the_default_value_still_overrides(modules: list[Module]) -> None:
    rules = ({"modules": ["q_proj"], "init": "zero"}, {"modules": ["q_proj"], "layers": "-1-", "init": "weights"})
    inits = [t.rule.init for t in resolve_targets(manifest(*rules), modules)]
    assert inits == ["zero"] * 31 + ["weights"]


def test_disabled_rules_take_modules_out(modules: list[Module]) -> None:
    rules = ({}, {"modules": ["*.mlp.*"], "enabled": False}, {"modules": ["up_proj"], "layers": [3], "enabled": True})
    names = [t.module.name for t in resolve_targets(manifest(*rules), modules)]
    assert len(names) == 32 * 4 + 1
    assert [n for n in names if "mlp" in n] == ["model.layers.3.mlp.up_proj"]


def test_nothing_enabled(modules: list[Module]) -> None:
    with pytest.raises(PlanError, match="no module is left enabled"):
        resolve_targets(manifest({"enabled": False}), modules)


def test_all_problems_at_once(modules: list[Module]) -> None:
    with pytest.raises(PlanError) as caught:
        resolve_targets(
            manifest(
                {"modules": ["q_poj", "lm_head", "embed_tokens", "self_attn.q_proj", "input_layernorm"]},
                {"modules": ["v_proj"], "layers": "30-40"},
                {"modules": ["model.layers.*.mpl.up_proj"]},
                {"modules": ["o_proj"], "shape": [3, 3, 5, 5]},
            ),
            modules,
        )
    message = caught.value.message
    for expected in (
        "adapt[0].modules: 'q_poj' matches no module; did you mean 'q_proj'?",
        "'lm_head' cannot be adapted: the output head",
        "'embed_tokens' cannot be adapted: the embedding is a table",
        "did you mean '*.self_attn.q_proj'?",
        "'input_layernorm' cannot be adapted: a norm is a vector",
        "adapt[1].layers: layers '30-40' is outside the model's 0-31",
        "adapt[2].modules: 'model.layers.*.mpl.up_proj' matches no module; did you mean",
        "adapt[3].shape:",
        "model.layers.0.self_attn.o_proj and 31 more",
    ):
        assert expected in message
    assert caught.value.exit_code == 2


def test_written_patterns_must_match_but_the_default_list_may_not() -> None:
    fused = [Module("model.layers.0.self_attn.o_proj", 8, 8, 0, "float32")]
    assert len(resolve_targets(manifest(), fused)) == 1
    with pytest.raises(PlanError, match="'q_proj' matches no module"):
        resolve_targets(manifest({"modules": ["q_proj", "o_proj"]}), fused)


def test_delta_without_finetuned_after_the_cascade(modules: list[Module]) -> None:
    rules = ({"init": "delta", "finetuned": "tuned"}, {"modules": ["q_proj"], "rank": {"policy": "fixed", "rank": 2}})
    assert {t.rule.finetuned for t in resolve_targets(manifest(*rules), modules)} == {"tuned"}
    broken = manifest().model_copy(update={"adapt": (manifest().adapt[0].model_copy(update={"init": "delta"}),)})
    with pytest.raises(PlanError, match="'delta' needs `finetuned`"):
        resolve_targets(broken, modules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"shape": "auto"}, "needs a factor shape that is known beforehand"),
        ({"init": "gradient"}, "there is none with init = 'gradient'"),
        ({"init": "zero"}, "there is none with init = 'zero' and no calibration_batches"),
        ({"calibration_batches": 0}, "there is none with init = 'weights' and no calibration_batches"),
    ],
)
def test_outputs_that_cannot_be_weighed(modules: list[Module], rule: dict[str, Any], message: str) -> None:
    both = {"init": "weights", "weighting": "both"}
    assert {t.rule.weighting for t in resolve_targets(manifest(both), modules)} == {"both"}
    with pytest.raises(PlanError, match=rf"adapt\[0\]\.weighting: .*{message}"):
        resolve_targets(manifest(both, {"modules": ["q_proj"], **rule}), modules)


def test_minor_components_after_the_cascade(modules: list[Module], caplog: pytest.LogCaptureFixture) -> None:
    minor: dict[str, Any] = {"modules": ["q_proj"], "components": "minor"}
    weights = {"init": "weights"}
    with pytest.raises(PlanError, match=r"adapt\[1\]\.components: components = 'minor' belongs to init = 'weights'"):
        resolve_targets(manifest({"init": "nystrom"}, minor), modules)
    with pytest.raises(PlanError, match=r"adapt\[0\]\.rank: policy = 'elbow' does not go with components = 'minor'"):
        resolve_targets(manifest(weights | {"rank": {"policy": "elbow"}}, minor), modules)
    with pytest.raises(
        PlanError, match=r"'both' .* there is none with components = 'minor' and no calibration_batches"
    ):
        resolve_targets(manifest(weights, minor | {"weighting": "both"}), modules)
    targets = resolve_targets(manifest(weights | {"calibration_batches": 4}, minor), modules)
    batches = {t.module.projection: t.rule.batches for t in targets}
    assert (batches["q_proj"], batches["k_proj"]) == (0, 4)


def test_tensor_parallel_shapes(modules: list[Module]) -> None:
    targets = resolve_targets(manifest({"tp": 8}), modules)
    for target in targets:
        assert target.shape is not None
        m, n, _, _ = target.shape
        assert (n if target.module.projection in ("o_proj", "down_proj") else m) % 8 == 0


@pytest.mark.parametrize("shape", ["balanced", "auto"])
def test_impossible_tensor_parallel_size(modules: list[Module], shape: str) -> None:
    with pytest.raises(PlanError, match=r"adapt\[0\]\.shape"):
        resolve_targets(manifest({"tp": 7, "shape": shape}), modules)


def test_rules_without_effect_are_logged(modules: list[Module], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_targets(
            manifest(
                {"modules": ["q_proj"], "init": "delta", "finetuned": "tuned"},
                {"modules": ["v_proj"]},
                {"init": "zero"},
            ),
            modules,
        )
        resolve_targets(
            manifest({"modules": ["q_proj"]}, {"modules": ["v_proj"]}, {"modules": ["q_proj"], "enabled": False}),
            modules,
        )
    text = caplog.text
    assert "adapt[0].finetuned has no effect" in text
    assert "adapt[0] has no effect: later rules disable" in text


def test_budgets_belong_to_the_rule_that_sets_them(modules: list[Module]) -> None:
    rules = (
        {"rank": {"policy": "budget", "parameters": 1000000}},
        {"modules": ["q_proj"], "rank": {"policy": "budget", "parameters": 500000}},
        {"modules": ["q_proj"], "layers": "0-3", "init": "zero"},
        {"modules": ["v_proj"], "rank": {"policy": "fixed", "rank": 1}},
    )
    loaded = manifest(*rules)
    groups = budget_groups(loaded, resolve_targets(loaded, modules))
    assert {index: len(group) for index, group in groups.items()} == {0: 32 * 5, 1: 32}


def test_problems_name_the_manifest_and_the_line(tmp_path: Path, modules: list[Module]) -> None:
    file = tmp_path / "m.toml"
    file.write_text(
        'schema = 1\n[base]\nbuiltin = "tiny"\n[[adapt]]\nmodules = ["q_poj"]\nlayers = "30-40"\n[[adapt]]\n'
        'modules = ["o_proj"]\nshape = [3, 3, 5, 5]\n[train.data]\nbuiltin = "math"\n'
    )
    loaded = read_manifest(file)
    with pytest.raises(PlanError) as caught:
        resolve_targets(loaded.manifest, modules, name_key=loaded.name_key)
    starts = [line.split(": ")[:2] for line in caught.value.message.splitlines()]
    assert starts == [
        [f"{file}:6:10", "adapt[0].layers"],
        [f"{file}:5:11", "adapt[0].modules"],
        [f"{file}:9:9", "adapt[1].shape"],
    ]


TOO_FEW = [
    # More of them than the shape, [64, 64, 64, 64] or [1, 1, 4096, 4096], has terms.
    ("init = 'truncated'\nrank = { policy = 'fixed', rank = 4096 }", "", "7:8", "adapt[0].rank", "4096 terms off"),
    ("shape = [1, 1, 4096, 4096]\ninit = 'truncated'", "", "3:1", "adapt[0].rank", "takes 1 terms off the weight"),
    ("extra_terms = 5\nshape = [2, 2, 2048, 2048]", "", "6:15", "adapt[0].extra_terms", "got 5, and the factor shape"),
    ("init = 'weights'", "protect = 4096", "8:11", "train.regularise.protect", "fewer than the 4096 terms"),
]


@pytest.mark.parametrize(("rule", "table", "place", "key", "message"), TOO_FEW)
def test_shapes_with_too_few_terms(
    tmp_path: Path, modules: list[Module], rule: str, table: str, place: str, key: str, message: str
) -> None:
    file = tmp_path / "m.toml"
    file.write_text(
        f'schema = 1\nbase = {{ builtin = "tiny" }}\n[[adapt]]\n# -\nmodules = ["q_proj"]\n{rule}\n'
        f'[train.regularise]\n{table}\n[train.data]\nbuiltin = "math"\n'
    )
    loaded = read_manifest(file)
    with pytest.raises(PlanError) as caught:
        resolve_targets(loaded.manifest, modules, name_key=loaded.name_key)
    assert caught.value.message.startswith(f"{file}:{place}: {key}: ")
    assert message in caught.value.message
    assert caught.value.message.endswith("(model.layers.0.self_attn.q_proj and 31 more)")


def test_what_a_shape_just_has_terms_for(modules: list[Module]) -> None:
    shape = {"modules": ["q_proj"], "shape": [2, 2, 2048, 2048]}
    cut = {"init": "truncated", "rank": {"policy": "fixed", "rank": 3}}
    for rule in (shape | {"extra_terms": 4}, shape | cut, {"extra_terms": 5, "shape": "auto", "init": "weights"}):
        assert resolve_targets(manifest(rule), modules)
