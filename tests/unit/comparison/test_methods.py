"""The methods that only comparisons train: they start at the base, learn, and train as many parameters as is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from soka_serve.base.model import load_base
from soka_serve.base.modules import Module
from soka_serve.base.read_modules import list_modules
from soka_serve.builtin import base_directory
from soka_serve.comparison.methods import AdaLoraSteps, build_extra
from soka_serve.comparison.preview import adapter_parameters
from soka_serve.comparison.suite import MANIFEST_METHODS, METHODS
from soka_serve.compiler.train.baselines import build_baseline

EXTRA = [m for m in METHODS if m not in MANIFEST_METHODS]
RANK = 2


def modules() -> list[Module]:
    return [m for m in list_modules(base_directory()) if m.projection in ("q_proj", "v_proj", "down_proj")]


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(method: str) -> Any:
    torch.manual_seed(0)
    model = load_base(base_directory(), "float32")
    names = [m.name for m in modules()]
    return build_extra(model, method, RANK, names, steps=10, batches=[batch(1), batch(2)])


@pytest.mark.parametrize("method", EXTRA)
def test_it_starts_at_the_base_and_a_step_has_an_effect(method: str) -> None:
    data = batch()
    with torch.no_grad():
        base = load_base(base_directory(), "float32")(**data).logits
    model = build(method).train()
    with torch.no_grad():
        start = model(**data).logits
    assert torch.allclose(start, base, atol=2e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    loss = model(**data).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**data)
    assert (after.logits - start).abs().max() > 1e-4
    assert after.loss < loss


@pytest.mark.parametrize("method", EXTRA)
def test_parameters_are_what_peft_counts(method: str) -> None:
    count, _ = build(method).get_nb_trainable_parameters()
    assert adapter_parameters(method, RANK, modules()) == count


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr"])
def test_parameters_of_the_baselines_too(method: Any) -> None:
    model = load_base(base_directory(), "float32")
    adapted = build_baseline(model, method, RANK, [m.name for m in modules()], str(base_directory()))
    count, _ = adapted.get_nb_trainable_parameters()
    assert adapter_parameters(method, RANK, modules()) == count


def test_adalora_reallocates_its_ranks_from_the_callback() -> None:
    model = build("adalora").train()
    callback = AdaLoraSteps()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def zero_scales() -> int:
        return sum(int((p == 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)

    for step in range(1, 11):
        model(**batch(step)).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(Any, SimpleNamespace(global_step=step), Any, model=model)  # type: ignore[arg-type]
        optimizer.zero_grad()
    # It began with three ranks a module and keeps two, wherever they are worth most.
    assert zero_scales() == len(modules())
