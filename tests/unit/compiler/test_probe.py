"""Statistics of the base on training batches: gradients and input moments, against autograd and plain sums."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from soka_serve.base.decoder import NotWalkableError
from soka_serve.base.modules import Module
from soka_serve.base.target_modules import TargetModule
from soka_serve.compiler.init.collect import Batch
from soka_serve.compiler.init.probe import batches_needed, gather, split_targets
from soka_serve.compiler.init.walk import LayerWalk
from soka_serve.data.collate import IGNORED, PadCollator
from soka_serve.data.encode import EncodedExample
from soka_serve.errors import CheckpointError
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.rules import Adapt
from tests.support.tiny_models import small_config

QUERY = "model.layers.0.self_attn.q_proj"
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(small_config(**SIZES)).double().eval().requires_grad_(False)


def _examples() -> list[EncodedExample]:
    """Six examples whose lengths, and shares of trained tokens, differ."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length, masked in ((5, 1), (9, 8), (4, 2), (12, 3), (7, 6), (6, 1)):
        ids = torch.randint(3, 32, (length,), generator=generator).tolist()
        examples.append(EncodedExample(ids, [IGNORED] * masked + ids[masked:]))
    return examples


def _batches() -> list[Batch]:
    examples, collate = _examples(), PadCollator(pad_id=0)
    return [collate(examples[i : i + 2]) for i in range(0, 6, 2)]


def _weighing(example: EncodedExample, x: torch.Tensor) -> torch.Tensor:
    """Inputs of an example where the next token is trained, but for the first; all of those that were routed."""
    x = x[0] if x.ndim > 2 else x  # (tokens, ...)
    labels = [*example.labels[1:], IGNORED]
    positions = [at for at, label in enumerate(labels) if at and label != IGNORED]
    return x[positions] if len(x) == len(labels) else x


def _target(model: Any, name: str, **rule: Any) -> TargetModule:
    weight = model.get_submodule(name).weight
    module = Module(name, weight.shape[0], weight.shape[1], int(name.split(".")[2]), "float64")
    return TargetModule(module, Adapt(**{"init": "weights"} | rule), (0,), None)


@pytest.mark.parametrize("on_disk", [False, True])
def test_gradients_are_those_of_the_asked_batches_together(model: Any, tmp_path: Path, on_disk: bool) -> None:
    scratch = tmp_path if on_disk else None
    targets = [
        _target(model, QUERY, init="gradient", calibration_batches=2),
        _target(model, DOWN, init="gradient", calibration_batches=3),
    ]
    found = {target.module.name: gradient for target, gradient, *_ in gather(model, _batches(), targets, scratch)}
    assert not list(tmp_path.iterdir())
    for name, asked in ((QUERY, 4), (DOWN, 6)):
        weight = model.get_submodule(name).weight.requires_grad_(True)
        whole = PadCollator(pad_id=0)(_examples()[:asked])
        model(**whole).loss.backward()
        gradient = found[name]
        assert gradient is not None
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), weight.grad, rtol=1e-5, atol=1e-7)
        weight.grad = None
        weight.requires_grad_(False)


def test_moments_are_the_products_of_what_the_layer_saw(model: Any) -> None:
    targets = [_target(model, name, calibration_batches=asked) for name, asked in ((QUERY, 1), (DOWN, 2))]
    found = {target.module.name: moments for target, _, moments, _ in gather(model, _batches(), targets)}
    seen: dict[str, list[torch.Tensor]] = {QUERY: [], DOWN: []}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
        for name in seen
    ]
    for example in _examples()[:4]:
        model(input_ids=torch.tensor([example.input_ids]))  # one by one: there is no padding to leave out
    for handle in handles:
        handle.remove()
    for name, asked in ((QUERY, 2), (DOWN, 4)):
        x = torch.cat([_weighing(*pair) for pair in zip(_examples()[:asked], seen[name], strict=False)])
        moments = found[name]
        assert moments is not None
        assert moments.tokens == len(x)
        torch.testing.assert_close(moments.moment().double(), x.t() @ x / len(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("walked", [True, False])
def test_moments_of_outputs_are_those_of_the_summed_loss(
    model: Any, walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not walked:
        monkeypatch.setattr(model, "get_decoder", lambda: None)
    targets = [_target(model, name, calibration_batches=2, weighting="both") for name in (QUERY, DOWN)]
    targets = [replace(t, shape=balanced_shape(t.module.out_features, t.module.in_features)) for t in targets]
    found = {known.target.module.name: known for known in gather(model, _batches(), targets)}
    alone = [replace(t, rule=t.rule.model_copy(update={"weighting": "inputs"})) for t in targets]
    for target, _, moments, none in gather(model, _batches(), alone):
        name, shape = target.module.name, target.shape
        assert none is None
        assert moments is not None
        assert shape is not None
        torch.testing.assert_close(found[name].moments.moment(), moments.moment())  # type: ignore[union-attr]
        expected = torch.zeros(shape.m, shape.m), torch.zeros(shape.p, shape.p)
        for example in _examples()[:4]:
            made: list[torch.Tensor] = []
            weight = model.get_submodule(name).weight.requires_grad_(True)
            handle = model.get_submodule(name).register_forward_hook(lambda _, x, y, made=made: made.append(y))
            labels = torch.tensor([example.labels])
            loss = model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss
            (slope,) = torch.autograd.grad(loss * (labels[:, 1:] != IGNORED).sum(), made)
            handle.remove()
            weight.requires_grad_(False)
            by_row = _weighing(example, slope).float().view(-1, shape.m, shape.p)
            expected[0].add_(torch.einsum("tip,tjp->ij", by_row, by_row))
            expected[1].add_(torch.einsum("tip,tiq->pq", by_row, by_row))
        for mine, plain in zip(found[name].outputs._sums, expected, strict=True):  # type: ignore[union-attr]
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-7)


class Experts(nn.Module):
    """Tokens, flattened and in another order, go to one of two experts; `again` is called twice, `idle` never."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2, bias=False)
        self.shared = nn.Linear(16, 16, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16, bias=False) for _ in range(2)])
        self.again = nn.Linear(16, 16, bias=False)
        self.idle = nn.Linear(16, 16, bias=False)
        self.heads = nn.Linear(4, 4, bias=False)
        self.mixed = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 16)
        chosen = self.gate(flat).argmax(-1)
        out = self.shared(input=flat)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0].flip(0)
            out = out.index_add(0, rows, expert(flat[rows]))
            if index:
                out = out.index_add(0, rows, self.mixed(flat[rows]))
        out = self.again(self.again(out).relu()) + self.mixed(flat)
        return self.heads(out.view(*x.shape[:2], 4, 4)).view_as(x)


@pytest.fixture(scope="module")
def routed() -> Any:
    """A model whose second layer has experts."""
    torch.manual_seed(0)
    routed = LlamaForCausalLM(small_config(**SIZES, num_key_value_heads=2))
    routed.model.layers[1].mlp = Experts()
    return routed.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shared() -> Any:
    """A model of transformers' with experts, of which the shared one sees (batch * tokens, features)."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=24,
    )  # fmt: skip
    made = Qwen2MoeForCausalLM(config)
    made.set_experts_implementation("eager")  # the others are not for float64
    return made.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("which", "modules"),
    [
        ("routed", ("gate", "shared", "experts.0", "experts.1", "again", "heads", "mixed")),
        ("shared", ("shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate")),
    ],
)
def test_moments_of_inputs_of_other_shapes(
    which: str, modules: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Flattened, parts of the batch, several calls: as without padding, in float64."""
    model = request.getfixturevalue(which)
    names = [f"model.layers.1.mlp.{module}" for module in modules]
    targets = [_target(model, name, calibration_batches=2 + index % 2) for index, name in enumerate(names)]
    found = {target.module.name: moments for target, _, moments, _ in gather(model, _batches(), targets)}
    for target in targets:
        name, width = target.module.name, target.module.in_features
        seen: list[torch.Tensor] = []
        calls: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, named, calls=calls: calls.append([*x, *named.values()][0]), with_kwargs=True
        )
        for example in _examples()[: 2 * target.rule.batches]:
            model(input_ids=torch.tensor([example.input_ids]))
            seen += [_weighing(example, x).reshape(-1, width) for x in calls]
            calls.clear()
        handle.remove()
        x = torch.cat(seen)
        moments = found[name]
        assert moments is not None, name
        assert moments.tokens == len(x), name
        torch.testing.assert_close(moments.moment().double(), x.t() @ x / len(x), rtol=1e-9, atol=1e-12)


def test_rows_whose_first_position_alone_is_trained_give_no_moments(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.tensor([[3, 4]])
    batch = {"input_ids": ids, "labels": torch.tensor([[IGNORED, 4]]), "attention_mask": torch.ones_like(ids)}
    ((_, _, moments, _),) = gather(model, [batch], [_target(model, QUERY)])
    assert moments is None
    assert "no trained token" in caplog.text


def test_a_module_that_no_token_reaches(routed: Any, caplog: pytest.LogCaptureFixture) -> None:
    idle, query = "model.layers.1.mlp.idle", QUERY.replace("layers.0", "layers.1")
    targets = [_target(routed, name, calibration_batches=1) for name in (idle, query)]
    found = {target.module.name: moments for target, _, moments, _ in gather(routed, _batches(), targets)}
    assert found[idle] is None
    assert found[query] is not None
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [idle]
    targets = [_target(routed, name, init="gradient") for name in (idle, query)]
    gradients = {target.module.name: gradient for target, gradient, *_ in gather(routed, _batches(), targets)}
    assert not gradients[idle].any()  # type: ignore[union-attr]
    assert gradients[query].any()  # type: ignore[union-attr]


@pytest.mark.parametrize("walked", [True, False])
def test_rows_without_trained_tokens_have_a_gradient_of_zero(
    model: Any, walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not walked:
        monkeypatch.setattr(model, "get_decoder", lambda: None)
    batches = [{**batch, "labels": torch.full_like(batch["labels"], IGNORED)} for batch in _batches()]
    ((_, gradient, *_),) = gather(model, batches, [_target(model, QUERY, init="gradient")])
    assert not gradient.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("stop_early", [False, True])
def test_the_model_is_left_as_it_was_found(model: Any, stop_early: bool) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = [_target(model, QUERY, init="gradient"), _target(model, DOWN, calibration_batches=1)]
    results = gather(model, _batches(), targets)
    if stop_early:
        next(results)
        results.close()  # type: ignore[attr-defined]
    else:
        assert len(list(results)) == 2
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rule", [{"init": "gradient"}, {"init": "weights", "calibration_batches": 1}])
def test_a_base_that_is_not_finite_is_named(model: Any, rule: dict[str, Any]) -> None:
    broken = copy.deepcopy(model)
    broken.get_submodule(QUERY).weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{QUERY}.weight: 1 of \d+ values are NaN"):
        list(gather(broken, _batches(), [_target(broken, DOWN, **rule)]))


def test_how_many_batches_the_rules_ask_for(model: Any) -> None:
    assert batches_needed([]) == 0
    assert batches_needed([_target(model, QUERY)]) == 8
    assert batches_needed([_target(model, QUERY, calibration_batches=0), _target(model, DOWN, init="zero")]) == 0
    assert batches_needed([_target(model, QUERY, init="gradient", calibration_batches=0)]) == 8
    assert batches_needed([_target(model, QUERY, init="gradient")]) == 8
    assert batches_needed([_target(model, QUERY, init="gradient", calibration_batches=2)]) == 2
    assert batches_needed([_target(model, QUERY, calibration_batches=3), _target(model, DOWN, init="random")]) == 3


def test_few_statistics_lie_in_memory_together() -> None:
    sizes = {"q": (64, 64), "k": (64, 64), "o": (64, 64), "gate": (172, 64), "up": (172, 64), "down": (64, 172)}
    for rule, counts in (({"init": "gradient"}, [2, 2, 2]), ({"init": "weights", "calibration_batches": 1}, [2, 4])):
        targets = [
            TargetModule(Module(f"model.layers.0.{name}", *size, 0, "float32"), Adapt(**rule), (0,), None)
            for name, size in sizes.items()
        ]
        most = 172 * 64 + 64 * 64 if rule["init"] == "gradient" else 172 * 172 + 64 * 64
        groups = split_targets(targets, most)
        assert sorted(t.module.name for g in groups for t in g) == sorted(t.module.name for t in targets)
        assert sum(counts) == len(targets)
        for group in groups:
            assert (
                sum(
                    t.module.in_features * (t.module.out_features if "init" in rule else t.module.in_features)
                    for t in group
                )
                <= most
            )


@pytest.mark.parametrize("rule", [{"init": "gradient"}, {"calibration_batches": 3}])
def test_each_layer_is_run_once_for_all_its_modules(model: Any, rule: dict[str, Any]) -> None:
    """And a gradient's pass backwards runs it a second time; one batch's rows are run once more as a check."""
    names = [
        f"model.layers.{layer}.{module}_proj"
        for layer in (0, 1)
        for module in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    ]
    targets = [_target(model, name, **rule) for name in names]
    calls = [0, 0]
    handles = [
        layer.mlp.register_forward_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
        for at, layer in enumerate(model.model.layers)
    ]
    found = {target.module.name: moments for target, _, moments, _ in gather(model, _batches(), targets)}
    for handle in handles:
        handle.remove()
    rows, check = 6, 2
    assert calls == [check + rows * (2 if "init" in rule else 1)] * 2
    if "init" not in rule:
        query, key, value, gate, up, down = (found[name] for name in names[:6])
        assert query is key is value
        assert gate is up
        assert len({id(query), id(gate), id(down)}) == 3


def test_a_walk_that_differs_from_a_forward_pass_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model.model

    def forward(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden = decoder.embed_tokens(input_ids)
        rotary = decoder.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=rotary) * 2  # something that no layer does
        return hidden

    monkeypatch.setattr(decoder, "forward", forward)
    rows = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(NotWalkableError, match="differ by"):
        LayerWalk(model, [rows])


def test_layers_that_cannot_be_walked_take_a_pass_of_the_whole(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    targets = [_target(model, DOWN, calibration_batches=2), _target(model, QUERY, init="gradient")]
    walked = {t.module.name: (gradient, moments) for t, gradient, moments, _ in gather(model, _batches(), targets)}
    assert not caplog.records
    monkeypatch.setattr(model, "get_decoder", lambda: None)
    whole = {t.module.name: (gradient, moments) for t, gradient, moments, _ in gather(model, _batches(), targets)}
    assert "cannot be run one by one" in caplog.text
    torch.testing.assert_close(walked[QUERY][0], whole[QUERY][0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(walked[DOWN][1].moment(), whole[DOWN][1].moment(), rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]
