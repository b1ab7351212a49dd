"""Batches: padding, packing, and that packed examples do not see each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from soka_serve.base.model import load_base
from soka_serve.data.collate import IGNORED, PadCollator, TokenDataset, has_target
from soka_serve.data.encode import EncodedExample, PackedRow, pack_examples
from tests.support.training import make_base, make_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The tiny base, evaluating without a cache as training does."""
    loaded = load_base(make_base(tmp_path_factory.mktemp("base"))).eval()
    loaded.config.use_cache = False
    return loaded


def test_rows_are_padded_to_the_longest() -> None:
    batch = PadCollator(pad_id=9)([EncodedExample([1, 2, 3], [IGNORED, 2, 3]), EncodedExample([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "position_ids" not in batch


def test_rows_are_padded_to_a_multiple() -> None:
    batch = PadCollator(pad_id=0, multiple_of=8)([EncodedExample([1] * 9, [1] * 9)])
    assert {tuple(t.shape) for t in batch.values()} == {(1, 16)}


def test_packed_rows_have_positions_and_no_mask() -> None:
    row = PackedRow([1, 2, 3, 4], [IGNORED, 2, 3, 4], [0, 1, 0, 1])
    batch = PadCollator(pad_id=9)([row, PackedRow([5] * 6, [5] * 6, list(range(6)))])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]]
    # The first token of an example is never a target, even when its label was left on (label 3 here).
    assert batch["labels"][0].tolist() == [IGNORED, 2, IGNORED, 4, IGNORED, IGNORED]


def test_padding_does_not_change_logits(model: PreTrainedModel) -> None:
    short, long = make_examples(2).examples
    batch = PadCollator(pad_id=0)([short, long])
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(input_ids=torch.tensor([short.input_ids])).logits
    torch.testing.assert_close(together[0, : len(short.input_ids)], alone[0], rtol=1e-5, atol=1e-5)


def test_packed_examples_do_not_see_each_other(model: PreTrainedModel) -> None:
    examples = make_examples(6).examples
    rows = pack_examples(examples, 16)
    assert len(rows) < len(examples)
    batch = PadCollator(pad_id=0, multiple_of=8)(rows)
    with torch.no_grad():
        packed = model(**batch).logits
        separate = {tuple(e.input_ids): model(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples}
        blind = model(input_ids=batch["input_ids"]).logits  # one causal sequence: the wrong mask
        cached = model(**batch, use_cache=True).logits  # transformers tells examples apart only without a cache
    checked = wrong = wrong_cached = 0
    for index, row in enumerate(rows):
        starts = [i for i, p in enumerate(row.position_ids) if p == 0] + [len(row.position_ids)]
        for start, end in itertools.pairwise(starts):
            expected = separate[tuple(row.input_ids[start:end])]
            torch.testing.assert_close(packed[index, start:end], expected, rtol=1e-5, atol=1e-5)
            checked += 1
            wrong += bool((blind[index, start:end] - expected).abs().max() > 1e-2)
            wrong_cached += bool((cached[index, start:end] - expected).abs().max() > 1e-2)
    assert checked == len(examples)
    # The comparison can fail: every example that does not begin its row differs under a plain causal mask.
    assert wrong == wrong_cached == len(examples) - len(rows)


def test_packed_loss_is_the_mean_over_the_same_tokens(model: PreTrainedModel) -> None:
    examples = make_examples(6).examples
    with torch.no_grad():
        packed = model(**PadCollator(pad_id=0)(pack_examples(examples, 16))).loss
        padded = model(**PadCollator(pad_id=0)(examples)).loss
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_an_example_with_nothing_to_learn_is_recognised() -> None:
    assert has_target([IGNORED, 5])
    assert not has_target([5, IGNORED])
    assert not has_target([])


def test_rows_is_a_dataset() -> None:
    examples = make_examples(3).examples
    rows = TokenDataset(examples)
    assert len(rows) == 3
    assert rows[1] is examples[1]
