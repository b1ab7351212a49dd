"""The slots of one layer: replaced, emptied, reused, and no larger than their content."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from soka_vllm.slots import SlotStore


def put(store: SlotStore, slot: int, rank: int, value: float) -> None:
    store.put(slot, 0, torch.full((rank, 2, 2), value), torch.ones(rank, 4, 4))


def rows(store: SlotStore, slots: list[int]) -> list[float]:
    """One output value per slot asked for; factors of ones times `value` make 8 * rank * value."""
    out = torch.zeros(len(slots), 8)
    store.add_to(out, torch.ones(len(slots), 8), torch.tensor(slots))
    assert all(len(set(row.tolist())) == 1 for row in out)
    return out[:, 0].tolist()


def test_slots_are_replaced_emptied_and_reused() -> None:
    store = SlotStore(3, [8], 8, torch.float32, "cpu")
    assert store.empty
    put(store, 0, 1, 1.0)
    put(store, 1, 3, 2.0)
    put(store, 2, 1, 3.0)
    assert rows(store, [0, 1, 2, -1]) == [8.0, 48.0, 24.0, 0.0]
    size = store.values.numel()
    assert size == (1 + 3 + 1) * (4 + 16)
    store.clear(1)
    assert rows(store, [0, 1, 2]) == [8.0, 0.0, 24.0]
    put(store, 1, 2, 5.0)  # fits into the gap
    assert rows(store, [0, 1, 2]) == [8.0, 80.0, 24.0]
    assert store.values.numel() == size
    put(store, 0, 4, 1.0)  # outgrows it
    assert rows(store, [0, 1, 2]) == [32.0, 80.0, 24.0]
    for slot in range(3):
        store.clear(slot)
    assert store.empty
    assert rows(store, [0, 1, 2]) == [0.0, 0.0, 0.0]


def test_slots_are_filled_inside_inference_mode_and_outside() -> None:
    store = SlotStore(2, [8], 8, torch.float32, "cpu")
    with torch.inference_mode():
        put(store, 0, 1, 1.0)
    put(store, 0, 1, 2.0)
    with torch.inference_mode():
        put(store, 1, 2, 1.0)
        assert rows(store, [0, 1]) == [16.0, 16.0]
    store.clear(1)
    assert rows(store, [0, 1]) == [16.0, 0.0]


@pytest.mark.parametrize(
    ("left", "right", "skips", "want"),
    [
        ((1, 2, 2), (1, 3, 4), (0, 0), r"\(8, 8\), of which rows \[0, 8\)"),
        ((1, 3, 2), (1, 3, 4), (2, 0), r"\(10, 8\), of which rows \[2, 10\)"),
        ((1, 2, 2), (1, 4, 4), (0, 1), r"\(8, 9\), of which rows \[0, 8\) and columns \[1, 9\)"),
        ((1, 3, 2), (1, 4, 4), (-1, 0), r"\(7, 8\)"),
        ((2, 2, 2), (1, 4, 4), (0, 0), r"equal rank"),
    ],
)
def test_wrong_shapes_leave_the_slot_alone(
    left: tuple[int, ...], right: tuple[int, ...], skips: tuple[int, int], want: str
) -> None:
    store = SlotStore(1, [8], 8, torch.float32, "cpu")
    put(store, 0, 1, 1.0)
    with pytest.raises(ValueError, match=rf"{want}.*; got left \({left[0]}, .*right \({right[0]}, "):
        store.put(0, 0, torch.ones(left), torch.ones(right), out_skip=skips[0], in_skip=skips[1])
    assert rows(store, [0]) == [8.0]


def test_importing_the_plugin_imports_no_vllm() -> None:
    code = "import sys, soka_vllm; sys.exit(any(m.split('.')[0] in ('vllm', 'torch') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
