"""Dropping terms during training: the model, the optimiser and the config shrink together, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from soka_serve.errors import BuildError, PlanError
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.peft import build_soka_model, create_soka_optimizer, drop_terms, get_factors, soka_layers, term_energies
from tests.support.kron_oracle import draw_factors
from tests.support.peft_models import logits, oracle_logits, perturb, saved, steps, tiny_llama, tokens, trainable

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
SHAPES = {Q: FactorShape(4, 16, 16, 4), DOWN: FactorShape(4, 28, 16, 4)}


def given() -> dict[str, Factors]:
    return {name: draw_factors(shape, 4, 3, torch.float32, scale=0.02) for name, shape in SHAPES.items()}


def dense(factors: Factors, k: int) -> Tensor:
    return factors.sigma[k].double() * torch.kron(factors.left[k].double(), factors.right[k].double())


@pytest.mark.parametrize("initial", [False, True])
def test_term_energies_are_norms_of_what_the_pair_adds(initial: bool) -> None:
    model = build_soka_model(tiny_llama(), given(), initial=initial)
    if initial:
        assert all(energy == 0.0 for energies in term_energies(model).values() for energy in energies)
    perturb(model, 0.01)
    theta, start = get_factors(model)
    for name, energies in term_energies(model).items():
        for k, energy in enumerate(energies):
            pair = dense(theta[name], k) - (dense(start[name], k) if initial else 0)
            assert energy == pytest.approx(float(pair.square().sum()), rel=1e-9)
            assert energy > 0


@pytest.mark.parametrize("initial", [False, True])
def test_dropping_a_term_takes_exactly_its_training_out(initial: bool, tmp_path: Path) -> None:
    ids = tokens()
    model = build_soka_model(tiny_llama(), given(), initial=initial).eval()
    perturb(model, 0.05)
    theta, start = get_factors(model)
    before = logits(model, ids)
    dropped = dense(theta[Q], 1) - (dense(start[Q], 1) if initial else 0)
    expected = soka_layers(model)[Q].get_delta_weight("default").detach().double() - dropped

    drop_terms(model, {Q: [3, 0, 2]})
    kept = soka_layers(model)[Q]
    assert torch.allclose(kept.get_delta_weight("default").double(), expected, atol=1e-6)
    assert torch.equal(get_factors(model)[0][Q].left, theta[Q].left[[0, 2, 3]])
    assert torch.equal(get_factors(model)[0][DOWN].left, theta[DOWN].left)
    assert model.peft_config["default"].soka_modules[Q]["rank"] == 3
    assert not torch.equal(logits(model, ids), before)

    oracle = oracle_logits(tiny_llama(), saved(model, tmp_path), ids)
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.allclose(logits(model, ids).double(), oracle, atol=1e-4)


@pytest.mark.parametrize("initial", [False, True])
def test_training_goes_on_as_if_the_dropped_terms_had_never_been(initial: bool) -> None:
    """The kept terms' parameters and AdamW state are bit for bit what they were, so the next steps are the same as
    those of a model that is built with the kept terms and given that state."""
    batches = [tokens()] * 3
    keep = {Q: [0, 3], DOWN: [1]}
    model = build_soka_model(tiny_llama(), given(), initial=initial)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    steps(model, optimizer, batches)
    identities = [id(p) for p in trainable(model)]
    drop_terms(model, keep, optimizer)
    assert [id(p) for p in trainable(model)] == identities
    for parameter in trainable(model):
        state = optimizer.state[parameter]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert float(state["step"]) == 3

    theta, start = get_factors(model)
    fresh = build_soka_model(tiny_llama(), {n: start.get(n, theta[n]) for n in theta}, initial=initial)
    for name, layer in soka_layers(fresh).items():
        layer.set_factors("default", theta[name], None)
    other = torch.optim.AdamW(trainable(fresh), lr=1e-2)
    for mine, theirs in zip(trainable(fresh), trainable(model), strict=True):
        other.state[mine] = {k: v.clone() for k, v in optimizer.state[theirs].items()}
    assert steps(model, optimizer, batches) == steps(fresh, other, batches)


def test_rates_are_those_of_the_terms_that_are_left() -> None:
    """The law divides by the root of a module's number of terms, now and at every later step of a schedule."""
    model = build_soka_model(tiny_llama(), given(), initial=True)
    optimizer = create_soka_optimizer(model, lr=0.3)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = [group["lr"] for group in optimizer.param_groups]
    steps(model, optimizer, [tokens()])
    scheduler.step()
    drop_terms(model, {Q: [2]}, optimizer, scheduler=scheduler)
    cut = [2.0 if group["params"][0].shape[0] == 1 else 1.0 for group in optimizer.param_groups]
    assert cut.count(2.0) == cut.count(1.0) == 2  # sigma is left alone
    for step in (1, 2):
        expected = [rate * factor / (1 + step) for rate, factor in zip(before, cut, strict=True)]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
        scheduler.step()


def test_rates_that_the_law_did_not_make_stay() -> None:
    model = build_soka_model(tiny_llama(), given(), initial=True)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in trainable(model)])
    drop_terms(model, {Q: [2]}, optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_gradients_are_cut_too() -> None:
    ids = tokens()
    model = build_soka_model(tiny_llama(), given(), initial=True)
    model(input_ids=ids, labels=ids).loss.backward()
    layer = soka_layers(model)[Q]
    gradient = layer.soka_left["default"].grad.clone()
    drop_terms(model, {Q: [1, 2]})
    assert torch.equal(layer.soka_left["default"].grad, gradient[1:3])


def test_a_checkpoint_with_fewer_terms_loads_into_a_model_with_more(tmp_path: Path) -> None:
    """The Trainer resumes into a model built from the manifest: what was pruned before must not be in the way."""
    ids = tokens()
    model = build_soka_model(tiny_llama(), given(), initial=True)
    perturb(model, 0.05)
    drop_terms(model, {Q: [0, 2], DOWN: [3]})
    model.save_pretrained(str(tmp_path))
    resumed = build_soka_model(tiny_llama(), given(), initial=True)
    parameters = [id(p) for p in trainable(resumed)]
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert [id(p) for p in trainable(resumed)] == parameters
    assert resumed.peft_config["default"].soka_modules[DOWN]["rank"] == 1
    assert torch.equal(logits(resumed, ids), logits(model.eval(), ids))
    resumed(input_ids=ids, labels=ids).loss.backward()
    assert soka_layers(resumed)[DOWN].soka_left["default"].grad.shape == (1, 4, 28)


def test_what_cannot_be_dropped() -> None:
    model = build_soka_model(tiny_llama(), given(), initial=True)
    with pytest.raises(PlanError, match=r"nowhere has no adapter.*q_proj: cannot keep terms \[\] of 4"):
        drop_terms(model, {"nowhere": [0], Q: []})
    for wrong in ([4], [-1], [0, 0]):
        with pytest.raises(PlanError, match="cannot keep terms"):
            drop_terms(model, {Q: wrong})
    assert len(soka_layers(model)[Q].soka_sigma["default"]) == 4


def test_an_optimizer_whose_state_cannot_be_cut_is_refused() -> None:
    from transformers.optimization import Adafactor

    ids = tokens()
    model = build_soka_model(tiny_llama(), given(), initial=True)
    optimizer = Adafactor(trainable(model), lr=1e-3, relative_step=False)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(BuildError, match="cannot be cut with the terms"):
        drop_terms(model, {Q: [0]}, optimizer)
