"""What a training step is made of: examples of similar lengths, and logits of the positions that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.length_groups import LengthGroups
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.compiler.train.trainer import SokaTrainer
from soka_serve.data.collate import PadCollator
from soka_serve.data.encode import EncodedExample, pack_examples
from tests.support.tiny_models import small_config
from tests.support.training import make_base, make_examples, run_training, tensors_of

LENGTHS = torch.randint(20, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_example_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    sampler, again, other = LengthGroups(LENGTHS, 8, 1), LengthGroups(LENGTHS, 8, 1), LengthGroups(LENGTHS, 8, 2)
    first = list(sampler)
    assert sorted(first) == list(range(len(sampler))) == list(range(len(LENGTHS)))
    assert first == list(sampler) == list(again)
    assert first != list(other)
    sampler.set_epoch(1)
    assert first != list(sampler)
    again.set_epoch(1)
    assert list(sampler) == list(again)
    assert sorted(LengthGroups([3, 1], 8, 0)) == [0, 1]


def test_groups_leave_little_padding_and_come_in_no_order_of_length() -> None:
    order = list(LengthGroups(LENGTHS, 8, 0))
    groups = [[LENGTHS[i] for i in order[k : k + 8]] for k in range(0, len(order), 8)]
    assert [len(group) for group in groups] == [8] * 25 + [3]  # an incomplete one comes last
    assert sum(max(group) * len(group) for group in groups) < 1.15 * sum(LENGTHS)
    longest = [max(group) for group in groups]
    assert not any(part in (sorted(part), sorted(part, reverse=True)) for part in (longest[:6], longest[6:12]))


@pytest.mark.parametrize("kind", ["padded", "packed", "nothing counts", "everything counts"])
@pytest.mark.parametrize("items", [None, torch.tensor(5)])
def test_loss_and_gradients_are_those_of_all_positions(kind: str, items: torch.Tensor | None) -> None:
    """Of every parameter of a float64 model; `items` is the number of counted tokens of all batches of a step.

    The bound is float32's: transformers computes losses and norms in that.
    """
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(small_config(vocab_size=48, use_cache=False)).double()
    examples = make_examples(6).examples
    if kind in ("nothing counts", "everything counts"):
        ids = [e.input_ids for e in examples]
        examples = [EncodedExample(i, i if kind == "everything counts" else [-100] * len(i)) for i in ids]
    batch = PadCollator(0)(pack_examples(examples, 16) if kind == "packed" else examples)
    head, counted = output_layer(model), int((batch["labels"][:, 1:] != -100).sum())
    assert head is not None

    def measure(inputs: dict[str, Any]) -> list[torch.Tensor]:
        model.zero_grad()
        output = model(**inputs, num_items_in_batch=items)
        output.loss.backward()
        sizes.append(output.logits.shape)
        return [output.loss, *(p.grad for p in model.parameters())]

    sizes: list[tuple[int, ...]] = []
    with trained_positions(head, batch) as picked:
        found = [measure(picked)]
    found.append(measure(batch))
    assert sizes == [(1, counted + 1, 48), (*batch["input_ids"].shape, 48)]
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-6, atol=1e-8)


def test_models_of_another_loss_are_left_alone() -> None:
    assert output_layer(nn.Linear(2, 2)) is None
    model = LlamaForCausalLM(small_config(vocab_size=48))
    model.loss_type = "ForMaskedLM"
    assert output_layer(model) is None


@pytest.mark.parametrize("options", [{}, {"method": "full", "accumulate": 2}, {"packing": True}, {"method": "lora"}])
def test_training_and_evaluation_are_those_of_all_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base")
    asked = options | {"eval_every": 2, "eval_set": make_examples(8, seed=3)}
    seen = []
    compute_loss = SokaTrainer.compute_loss
    monkeypatch.setattr(SokaTrainer, "compute_loss", lambda *a, **k: seen.append(1) or compute_loss(*a, **k))
    picked = run_training(base, tmp_path / "picked", **asked)
    monkeypatch.undo()
    assert seen
    monkeypatch.setattr("soka_serve.compiler.train.trainer.output_layer", lambda model: None)
    whole = run_training(base, tmp_path / "whole", **asked)
    for key in ("loss", "eval_loss"):
        one, other = ([line[key] for line in read_history(r.history) if key in line] for r in (picked, whole))
        assert one == pytest.approx(other, rel=1e-4)
        assert one
    expected = tensors_of(whole)
    for name, tensor in tensors_of(picked).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4)


def test_batches_are_grouped_unless_the_manifest_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, widths = make_base(tmp_path / "base"), []
    call = PadCollator.__call__

    def watched(self: PadCollator, rows: Any) -> Any:
        widths[-1].append(len({len(row.input_ids) for row in rows}))
        return call(self, rows)

    monkeypatch.setattr(PadCollator, "__call__", watched)
    for grouped in (True, False):
        widths.append([])
        run_training(base, tmp_path / str(grouped), steps=8, group_by_length=grouped)
    mixed = [sum(count > 1 for count in run) for run in widths]
    assert mixed[0] <= 2 < mixed[1]
