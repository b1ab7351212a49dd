"""The slots of one layer: replaced, emptied, reused, and no larger than their content."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soka_vllm.arena import Arena, Buffer
from soka_vllm.slots import Arranged, SlotStore


def put(store: SlotStore, slot: int, rank: int, value: float) -> None:
    store.put(slot, 0, torch.full((rank, 2, 2), value), torch.ones(rank, 4, 4))


def rows(store: SlotStore, slots: list[int]) -> list[float]:
    """One output value per slot asked for; factors of ones times `value` make 8 * rank * value."""
    out = torch.zeros(len(slots), 8)
    store.add_to(out, torch.ones(len(slots), 8), torch.tensor(slots))
    assert all(len(set(row.tolist())) == 1 for row in out)
    return out[:, 0].tolist()


def values_of(store: SlotStore) -> int:
    """How many values its buffer has given out."""
    return (store.nbytes - store.table.nbytes) // store.values.element_size()


def test_slots_are_replaced_emptied_and_reused() -> None:
    store = SlotStore(3, [8], 8, torch.float32, "cpu")
    assert store.empty
    put(store, 0, 1, 1.0)
    put(store, 1, 3, 2.0)
    put(store, 2, 1, 3.0)
    assert rows(store, [0, 1, 2, -1]) == [8.0, 48.0, 24.0, 0.0]
    size = values_of(store)
    assert size == (1 + 3 + 1) * (4 + 16)
    store.clear(1)
    assert rows(store, [0, 1, 2]) == [8.0, 0.0, 24.0]
    put(store, 1, 2, 5.0)  # fits into the gap
    assert rows(store, [0, 1, 2]) == [8.0, 80.0, 24.0]
    assert values_of(store) == size
    put(store, 0, 4, 1.0)  # outgrows it
    assert rows(store, [0, 1, 2]) == [32.0, 80.0, 24.0]
    for slot in range(3):
        store.clear(slot)
    assert store.empty
    assert rows(store, [0, 1, 2]) == [0.0, 0.0, 0.0]


def test_factors_of_the_same_kinds_are_overwritten_in_place() -> None:
    store = SlotStore(3, [8, 8], 8, torch.float32, "cpu")

    def parts(rank: int, value: float) -> list[tuple[int, Arranged]]:
        left, right = torch.full((rank, 2, 2), value), torch.ones(rank, 4, 4)
        return [(index, store.arrange(left * (index + 1), right)) for index in range(2)]

    def outputs(slot: int) -> list[float]:
        out = torch.zeros(1, 16)
        store.add_to(out, torch.ones(1, 8), torch.tensor([slot]))
        return out[0, [0, 8]].tolist()

    assert not store.overwrite(0, parts(1, 1.0))  # nothing is there
    assert store.empty
    store.fill(0, parts(1, 1.0))
    store.fill(1, parts(1, 5.0))
    table, size = store.table.clone(), values_of(store)
    assert store.overwrite(0, parts(1, 2.0))
    assert (outputs(0), outputs(1)) == ([16.0, 32.0], [40.0, 80.0])
    assert torch.equal(store.table, table)
    assert values_of(store) == size
    for other in (parts(2, 3.0), parts(1, 3.0)[:1], parts(1, 3.0)[::-1]):
        assert not store.overwrite(0, other)
        assert outputs(0) == [16.0, 32.0]
    store.put(0, 1, torch.ones(1, 2, 2), torch.ones(1, 4, 4))  # its slices now lie apart
    assert not store.overwrite(0, parts(1, 3.0))
    assert outputs(0) == [16.0, 8.0]
    store.clear(0)
    assert not store.overwrite(0, parts(1, 3.0))
    assert (outputs(0), outputs(1)) == ([0.0, 0.0], [40.0, 80.0])


def test_what_is_remembered_of_factors_is_bounded_whatever_clients_load() -> None:
    """Sums of adapters have any ranks; slots that stay filled keep their kinds."""
    store = SlotStore(3, [8, 8], 8, torch.float32, "cpu")
    put(store, 1, 2, 3.0)
    for rank in range(1, 400):
        parts = [(i, store.arrange(torch.ones(rank + i, 2, 2), torch.ones(rank + i, 4, 4))) for i in range(2)]
        store.clear(0)
        store.fill(0, parts)
        put(store, 2, rank, 1.0)
    assert len(store._patterns) <= 64
    assert len(store._kinds) <= 200
    out = torch.zeros(3, 16)
    store.add_to(out, torch.ones(3, 8), torch.tensor([0, 1, 2]))
    assert out[:, ::8].tolist() == [[8 * 399, 8 * 400], [48, 0], [8 * 399, 0]]


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


@pytest.mark.parametrize(("left", "right"), [((3, 2, 2), (3, 8, 16)), ((3, 4, 8), (3, 4, 4)), ((1, 16, 1), (1, 1, 32))])
def test_what_is_arranged_before_is_put_as_it_is(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    """In both orders of the products; the factors come back as they were."""
    lefts, rights = torch.randn(left), torch.randn(right)
    stores = [SlotStore(2, [5, 16], 32, torch.float32, "cpu") for _ in range(2)]
    stores[0].put(1, 1, lefts, rights)
    arranged = stores[1].arrange(lefts, rights)
    stores[1].fill(1, [(1, arranged)])
    for put_in, got in zip((lefts, rights), arranged.factors, strict=True):
        assert torch.equal(put_in, got)
        assert got.untyped_storage().data_ptr() == arranged.values.untyped_storage().data_ptr()
    assert torch.equal(stores[0].values, stores[1].values)
    assert torch.equal(stores[0].table, stores[1].table)
    assert stores[0].table[1, 1, -2:].tolist() == [5, 16]
    stores[1].clear(1)
    assert not stores[1].table.any()


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


def test_an_arena_is_shared_by_layers_and_never_moves() -> None:
    """Each slot has its part; what one layer gives back, another can take; full is an error that names the limit."""
    arena = Arena(2, 60, torch.float32, torch.device("cpu"))
    first, second = (SlotStore(2, [8], 8, torch.float32, "cpu", arena) for _ in range(2))
    address = first.values.data_ptr()
    put(first, 0, 1, 1.0)
    put(second, 0, 2, 2.0)
    put(second, 1, 3, 3.0)
    assert (first.slot_values, second.slot_values) == (60, 60)
    assert rows(first, [0, 1]) == [8.0, 0.0]
    assert rows(second, [0, 1]) == [32.0, 72.0]
    assert second.nbytes - first.nbytes == (5 - 1) * (4 + 16) * 4
    with pytest.raises(
        ValueError, match=r"need 80 values on this GPU; a slot has room for 60.*SOKA_SLOT_PARAMETERS=80"
    ):
        put(first, 1, 1, 1.0)
    assert rows(first, [0, 1]) == [8.0, 0.0]
    second.clear(1)
    put(first, 1, 1, 4.0)
    put(second, 1, 2, 5.0)
    put(first, 0, 1, 6.0)  # in place of what it held
    assert rows(first, [0, 1]) == [48.0, 32.0]
    assert rows(second, [0, 1]) == [32.0, 80.0]
    assert first.values.data_ptr() == second.values.data_ptr() == address


def test_filling_many_slots_does_not_copy_all_of_them_each_time() -> None:
    store = SlotStore(300, [8], 8, torch.float32, "cpu")
    addresses = set()
    for slot in range(300):
        put(store, slot, 1, float(slot))
        assert values_of(store) == 20 * (slot + 1)  # no more than what is held
        addresses.add(store.values.data_ptr())
    assert len(addresses) <= 10
    assert rows(store, list(range(300))) == [8.0 * slot for slot in range(300)]


@given(steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 3, 5, 8])), max_size=60), arena=st.booleans())
def test_stretches_never_overlap(steps: list[tuple[int, int]], arena: bool) -> None:
    """Adapters of several sizes come and go in any order."""
    memory = Arena(2, 24, torch.float32, torch.device("cpu")) if arena else Buffer(torch.float32, torch.device("cpu"))
    held: dict[int, tuple[int, int]] = {}
    for who, size in steps:
        if who in held:
            memory.give_back(1, held.pop(who)[0])
        try:
            start = memory.take(1, size)
        except ValueError:
            assert isinstance(memory, Arena)
            continue
        held[who] = (start, size)
        ends = [24 if arena else 0, *(end for pair in sorted(held.values()) for end in (pair[0], sum(pair)))]
        assert ends == sorted(ends)
        assert ends[-1] <= (48 if arena else memory.size)
    for start, _ in held.values():
        memory.give_back(1, start)
    assert memory.take(1, 24) == (24 if arena else 0)  # nothing is lost


def test_a_growing_buffer_has_no_limit() -> None:
    assert SlotStore(1, [8], 8, torch.float32, "cpu").slot_values is None


def test_only_on_a_cpu_an_empty_store_may_be_left_out() -> None:
    """CUDA graphs are recorded while the slots are empty ("meta" stands for any other device)."""
    assert SlotStore(1, [8], 8, torch.float32, "cpu").empty
    assert not SlotStore(1, [8], 8, torch.float32, "meta").empty


def test_the_shared_arena_lives_as_long_as_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOKA_SLOT_PARAMETERS", "7")
    cpu = torch.device("cpu")
    arena = Arena.shared(3, torch.float32, cpu)
    assert arena.values.shape == (21,)
    assert Arena.shared(3, torch.float32, cpu) is arena
    assert Arena.shared(2, torch.float32, cpu) is not arena
    gone = weakref.ref(arena)
    del arena
    assert gone() is None
    for wrong in ("0", "-5", "1e6", ""):
        monkeypatch.setenv("SOKA_SLOT_PARAMETERS", wrong)
        with pytest.raises(ValueError, match=f"SOKA_SLOT_PARAMETERS: expected a positive integer; got '{wrong}'"):
            Arena.shared(3, torch.float32, cpu)


def test_importing_the_plugin_imports_no_vllm() -> None:
    code = "import sys, soka_vllm; sys.exit(any(m.split('.')[0] in ('vllm', 'torch') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
