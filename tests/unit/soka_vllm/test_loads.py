"""Loads over several workers: all serve the same, whichever of them fails and when. The workers here are stand-ins."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from soka_vllm import engine
from soka_vllm.engine import EngineAdapters, add_lora, add_request, prefix_keys, remove_lora
from soka_vllm.settings import KEEP_VARIABLE, SUMS_VARIABLE, keep_limit


class LoadRequest(msgspec.Struct):
    """The fields of vLLM's LoRARequest that count here."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


class Manager:
    """What a worker has on its disk and in its slots: names to values, and ids to values."""

    def __init__(self) -> None:
        self.disk: dict[str, float] = {}
        self.slots: dict[int, float] = {}
        self.full = False
        self.reads = 0

    def _load_adapter(self, request: LoadRequest) -> Any:
        assert request.load_inplace  # else the one in memory would do
        self.reads += 1
        if request.lora_path not in self.disk:
            raise ValueError(f"{request.lora_path} is not there")
        value = torch.full((1, 2, 2), self.disk[request.lora_path])
        return SimpleNamespace(loras={"q": SimpleNamespace(lora_a=value, lora_b=value, scaling=1)})

    def add_adapter(self, request: LoadRequest) -> bool:
        assert not request.load_inplace
        if self.full:
            raise RuntimeError("out of memory")
        kept = self.__dict__["_soka_kept"]
        self.slots[request.lora_int_id] = float(kept.model(request.lora_int_id).loras["q"].lora_a[0, 0, 0])
        return True

    def remove_adapter(self, number: int) -> bool:
        return self.slots.pop(number, None) is not None


class Core:
    """Two workers and a scheduler."""

    def __init__(self) -> None:
        self.managers = [Manager(), Manager()]
        self.model_executor = self
        self.scheduler = SimpleNamespace(requests={})
        self.vllm_config = SimpleNamespace(
            model_config=None, parallel_config=SimpleNamespace(enable_expert_parallel=False)
        )
        self.refused: list[str] = []

    def collective_rpc(self, method: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        workers = [SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)) for manager in self.managers]
        return [method(worker, *args) for worker in workers]

    def _send_error_outputs_to_client(self, ids: list[str], client: int) -> None:
        self.refused += ids

    def write(self, path: str, *values: float | None) -> None:
        for manager, value in zip(self.managers, values * (2 // len(values)), strict=True):
            if value is None:
                manager.disk.pop(path, None)
            else:
                manager.disk[path] = value

    def served(self, number: int) -> list[float | None]:
        """What each worker serves once the adapter is in a slot again."""
        request = LoadRequest("x", number, "")
        for manager in self.managers:
            if manager.__dict__["_soka_kept"].model(number) is not None:
                manager.add_adapter(request)
        return [manager.slots.get(number) for manager in self.managers]


class Request:
    """A request to the model."""

    soka_fingerprint: str | None

    def __init__(self, name: str, lora_request: LoadRequest | None) -> None:
        self.request_id, self.client_index, self.lora_request = name, 0, lora_request
        self.block_hashes: list[object] = []
        self.num_computed_tokens = 0
        self.update_block_hashes()

    def update_block_hashes(self) -> None:
        self.block_hashes += prefix_keys(None, self)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    monkeypatch.setattr(engine, "check_served_base", lambda *_: None)
    monkeypatch.setattr(engine, "_fingerprints", {})
    monkeypatch.delenv(KEEP_VARIABLE, raising=False)
    return Core()


def ask(core: Core, name: str, lora_request: LoadRequest | None) -> Request | None:
    """Let a request in; None where it is refused."""
    request = Request(name, lora_request)

    def stock(core: Any, request: Any, wave: int) -> None:
        core.scheduler.requests[request.request_id] = request

    add_request(stock, core, request)
    return core.scheduler.requests.get(name)  # type: ignore[no-any-return]


def test_all_or_none_read(core: Core) -> None:
    core.write("a", 1.0)
    assert add_lora(None, core, LoadRequest("a", 1, "a"))
    assert core.served(1) == [1.0, 1.0]
    core.write("b", 2.0, None)
    with pytest.raises(ValueError, match="b is not there"):
        add_lora(None, core, LoadRequest("b", 2, "b"))
    assert core.served(2) == [None, None]
    core.write("a", 3.0, None)
    with pytest.raises(ValueError, match="a is not there"):
        add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert core.served(1) == [1.0, 1.0]
    core.write("a", 3.0, 4.0)
    with pytest.raises(ValueError, match="different contents"):
        add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert core.served(1) == [1.0, 1.0]
    core.write("a", 4.0)
    assert add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert core.served(1) == [4.0, 4.0]


def test_all_or_none_take(core: Core) -> None:
    """One worker reads it and has no room: both go back, to nothing or to what they served."""
    core.write("a", 1.0)
    core.managers[1].full = True
    with pytest.raises(ValueError, match="out of memory"):
        add_lora(None, core, LoadRequest("a", 1, "a"))
    core.managers[1].full = False
    assert core.served(1) == [None, None]
    assert add_lora(None, core, LoadRequest("a", 1, "a"))
    core.write("a", 2.0)
    core.managers[0].full = True
    with pytest.raises(ValueError, match="out of memory"):
        add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    core.managers[0].full = False
    assert core.served(1) == [1.0, 1.0]
    kept = ask(core, "r", LoadRequest("a", 1, "a"))
    assert kept is not None
    assert core.managers[0].reads == 3


def test_an_adapter_that_cannot_be_put_into_a_slot_stays_in_memory(core: Core) -> None:
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    core.write("a", None)
    core.managers[1].full = True
    with pytest.raises(ValueError, match="out of memory"):
        add_lora(None, core, LoadRequest("a", 1, "a"))
    core.managers[1].full = False
    assert ask(core, "r", LoadRequest("a", 1, "a"))
    assert core.served(1) == [1.0, 1.0]


def test_a_request_reads_no_files_while_its_adapter_is_kept(core: Core) -> None:
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    core.write("a", None)
    assert ask(core, "r", LoadRequest("a", 1, "a"))
    assert ask(core, "base", None)
    assert [manager.reads for manager in core.managers] == [1, 1]


def test_what_was_dropped_is_read_again_or_its_request_refused(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_VARIABLE, "0")
    for number, name in enumerate("abc", 1):
        core.write(name, float(number))
        add_lora(None, core, LoadRequest(name, number, name))
    assert core.served(1) == [1.0, 1.0]  # its slot; the memory is given up
    assert core.managers[0].__dict__["_soka_kept"].adapters.keys() == {3}
    assert ask(core, "a", LoadRequest("a", 1, "a"))
    core.write("b", None)
    assert ask(core, "b", LoadRequest("b", 2, "b")) is None
    core.write("c", 9.0)
    assert ask(core, "c", LoadRequest("c", 3, "c")) is None
    assert core.refused == ["b", "c"]
    # The request that is under way keeps its adapter.
    assert 1 in core.managers[0].__dict__["_soka_kept"].adapters


def test_prefixes_are_told_apart_by_what_the_adapter_holds(core: Core) -> None:
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    first = ask(core, "first", LoadRequest("a", 1, "a"))
    assert first
    before = list(first.block_hashes)
    early = Request("early", LoadRequest("a", 1, "a"))  # made before the reload, let in after it
    core.write("a", 2.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    second = ask(core, "second", LoadRequest("a", 1, "a"))
    add_request(lambda core, request, wave: None, core, early)
    core.write("b", 2.0)
    add_lora(None, core, LoadRequest("a", 2, "b"))
    third = ask(core, "third", LoadRequest("a", 2, "a"))  # unloaded and loaded: the same again
    assert second
    assert third
    assert before != second.block_hashes
    assert early.block_hashes == second.block_hashes == third.block_hashes
    assert prefix_keys(None, Request("base", None)) == []


@pytest.mark.parametrize("back", [False, True])
def test_a_prompt_that_is_hashed_during_a_reload_is_hashed_again(core: Core, back: bool) -> None:
    """Another thread hashes it, a key for each block."""
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    early = Request("early", LoadRequest("a", 1, "a"))
    for value in (2.0, 1.0) if back else (2.0,):
        core.write("a", value)
        add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
        early.update_block_hashes()
    add_request(lambda core, request, wave: None, core, early)
    late = ask(core, "late", LoadRequest("a", 1, "a"))
    assert late
    assert set(early.block_hashes) == set(late.block_hashes)
    early.update_block_hashes()
    assert set(early.block_hashes) == set(late.block_hashes)


def test_requests_in_the_scheduler_are_hashed_again_when_their_adapter_changes(core: Core) -> None:
    def fresh(name: str) -> list[object]:
        found = Request(name, LoadRequest("a", 1, "a"))
        return found.block_hashes

    core.write("a", 1.0)
    core.write("b", 5.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    add_lora(None, core, LoadRequest("b", 2, "b"))
    waiting, running, also = (ask(core, name, LoadRequest("a", 1, "a")) for name in ("waiting", "running", "also"))
    other = ask(core, "other", LoadRequest("b", 2, "b"))
    assert waiting and running and also and other  # noqa: PT018
    before, others = fresh("x"), list(other.block_hashes)
    running.num_computed_tokens = also.num_computed_tokens = 12
    core.write("a", 2.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    after = fresh("y")
    assert waiting.block_hashes == after != before
    for hashes in (running.block_hashes, also.block_hashes):  # of both contents: nobody else may find those blocks
        assert hashes not in (before, after)
        assert len(hashes) == len(after)
    assert running.block_hashes != also.block_hashes
    running.update_block_hashes()  # a block that is full later
    assert len(set(running.block_hashes)) == 1
    assert other.block_hashes == others
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert waiting.block_hashes == fresh("z") == before


def test_a_request_that_says_load_inplace_reads_the_adapter_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that runs the engine itself; a sum of the adapter is then made anew, too."""
    monkeypatch.setenv(SUMS_VARIABLE, "2")
    path = f"soka-sum:{json.dumps([[2, 'a', 1, 'a', False, 0]])}"
    core.write("a", 1.0)
    core.write(path, 2.0)
    assert ask(core, "first", LoadRequest("a", 1, "a"))
    assert ask(core, "sum", LoadRequest("2*a", 7, path))
    core.write("a", 3.0)
    core.write(path, 6.0)
    assert ask(core, "plain", LoadRequest("a", 1, "a"))
    assert core.served(1) == [1.0, 1.0], "as it was loaded"
    assert ask(core, "again", LoadRequest("a", 1, "a", load_inplace=True))
    assert core.served(1) == [3.0, 3.0]
    reads = core.managers[0].reads
    assert ask(core, "new sum", LoadRequest("2*a", 7, path))
    assert core.served(7) == [6.0, 6.0]
    assert ask(core, "same sum", LoadRequest("2*a", 7, path))
    assert core.managers[0].reads == reads + 1


def test_a_sum_that_is_loaded_after_its_adapter_changed_is_made_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SUMS_VARIABLE, "2")
    path = f"soka-sum:{json.dumps([[2, 'a', 1, 'a', False, 0]])}"
    core.write("a", 1.0)
    core.write(path, 2.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    add_lora(None, core, LoadRequest("2*a", 7, path))
    core.write("a", 3.0)
    core.write(path, 6.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    add_lora(None, core, LoadRequest("2*a", 7, path))
    assert core.served(7) == [6.0, 6.0]
    reads = core.managers[0].reads
    add_lora(None, core, LoadRequest("2*a", 7, path))
    assert core.managers[0].reads == reads


def remove(core: Core, number: int) -> bool:
    def stock(core: Any, number: int) -> bool:  # what vLLM's executor does
        removed = [manager.remove_adapter(number) for manager in core.managers]
        return all(removed)

    return remove_lora(stock, core, number)


def test_what_was_removed_is_read_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUMS_VARIABLE, "2")
    path = f"soka-sum:{json.dumps([[2, 'a', 1, 'a', False, 0]])}"
    core.write("a", 1.0)
    core.write("b", 5.0)
    core.write(path, 2.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    add_lora(None, core, LoadRequest("2*a", 7, path))
    assert remove(core, 1)
    assert not remove(core, 1)
    assert core.served(1) == [None, None]
    assert 1 not in core._soka_adapters.nbytes  # type: ignore[attr-defined]
    add_lora(None, core, LoadRequest("b", 1, "b"))
    assert core.served(1) == [5.0, 5.0]
    assert remove(core, 1)
    core.write("a", 3.0)
    core.write(path, 6.0)
    assert ask(core, "sum", LoadRequest("2*a", 7, path))
    assert core.served(7) == [6.0, 6.0]
    assert core.served(1) == [3.0, 3.0]
    assert remove(core, 1)
    assert ask(core, "b", LoadRequest("b", 1, "b"))  # as a program of one's own may ask for it
    assert core.served(1) == [5.0, 5.0]


def test_what_was_dropped_from_memory_is_removed_too(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_VARIABLE, "0")
    for number, name in enumerate("abc", 1):
        core.write(name, float(number))
    add_lora(None, core, LoadRequest("a", 1, "a"))
    add_lora(None, core, LoadRequest("b", 2, "b"))
    assert remove(core, 1)
    assert ask(core, "c", LoadRequest("c", 1, "c"))
    assert core.served(1) == [3.0, 3.0]


def test_what_a_request_uses_is_removed_when_it_is_loaded_again(core: Core) -> None:
    """A step of that request reads no files."""
    core.write("a", 1.0)
    core.write("b", 5.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    running = ask(core, "running", LoadRequest("a", 1, "a"))
    assert running
    running.num_computed_tokens = 12
    before = list(running.block_hashes)
    assert remove(core, 1)
    assert [manager.slots for manager in core.managers] == [{}, {}]
    assert core.served(1) == [1.0, 1.0]
    add_lora(None, core, LoadRequest("b", 1, "b"))
    assert core.served(1) == [5.0, 5.0]
    assert before != running.block_hashes


def test_what_a_front_end_has_hashed_is_hashed_again(core: Core) -> None:
    """A front end of vLLM from 0.34 on may send a prompt's hashes, which know nothing of what the adapter holds."""
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    own = ask(core, "own", LoadRequest("a", 1, "a"))
    sent = Request("sent", LoadRequest("a", 1, "a"))
    sent.block_hashes = [("lora", "a", "a")]
    del sent.soka_fingerprint  # vLLM hashes nothing of a prompt that comes with its hashes
    add_request(lambda core, request, wave: None, core, sent)
    assert own
    assert sent.block_hashes == own.block_hashes


def test_what_any_worker_has_read_counts_where_each_reads_its_own_experts(core: Core) -> None:
    core.vllm_config.parallel_config.enable_expert_parallel = True
    core.write("a", 1.0, 2.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    first = ask(core, "first", LoadRequest("a", 1, "a"))
    assert first
    before = list(first.block_hashes)
    core.write("a", 1.0, 3.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert first.block_hashes != before
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    alike = list(first.block_hashes)
    core.vllm_config.parallel_config.enable_expert_parallel = False
    add_lora(None, core, LoadRequest("a", 1, "a", load_inplace=True))
    assert first.block_hashes == alike


def test_engines_of_one_process_know_nothing_of_each_other(core: Core) -> None:
    other = Core()
    core.write("a", 1.0)
    other.write("b", 2.0)
    first = ask(core, "first", LoadRequest("a", 1, "a"))
    assert ask(other, "theirs", LoadRequest("b", 1, "b"))
    assert other.served(1) == [2.0, 2.0]
    assert first
    before = set(first.block_hashes)
    again = ask(core, "again", LoadRequest("a", 1, "a"))
    assert again
    again.update_block_hashes()
    first.update_block_hashes()
    assert set(again.block_hashes) == set(first.block_hashes) == before


def test_in_the_callers_own_process_a_refusal_is_an_error(core: Core) -> None:
    core._send_error_outputs_to_client = None  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="gone is not there"):
        ask(core, "r", LoadRequest("gone", 1, "gone"))


def test_a_refused_request_is_told_why_where_vllm_can(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """From vLLM 0.33 on."""
    told: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "vllm.outputs", SimpleNamespace(RequestError=lambda **error: error))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", SimpleNamespace(FinishReason=SimpleNamespace(ERROR=3)))  # type: ignore[arg-type]

    def finish(req_ids: list[str], client_index: int, finish_reason: int, error: Any = None) -> None:
        told.append((req_ids, client_index, finish_reason, error))

    monkeypatch.setattr(core, "_send_finish_outputs_to_client", finish, raising=False)
    assert ask(core, "r", LoadRequest("gone", 1, "gone")) is None
    assert told == [(["r"], 0, 3, {"code": "adapter_refused", "message": "gone is not there"})]
    assert core.refused == []


def test_a_vllm_that_takes_no_reason_is_given_none(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.32, whose RequestError is for other errors."""

    def finish(req_ids: list[str], client_index: int, finish_reason: int) -> None:
        raise AssertionError

    monkeypatch.setitem(sys.modules, "vllm.outputs", SimpleNamespace(RequestError=lambda **error: error))  # type: ignore[arg-type]
    monkeypatch.setattr(core, "_send_finish_outputs_to_client", finish, raising=False)
    assert ask(core, "r", LoadRequest("gone", 1, "gone")) is None
    assert core.refused == ["r"]


# --- what workers are told to keep ------------------------------------------------------------------------------------


def kept(limit: int, **sizes: int) -> EngineAdapters:
    adapters = EngineAdapters(limit)
    for name, size in sizes.items():
        adapters.nbytes[int(name.removeprefix("a"))] = size
    return adapters


def test_the_oldest_make_room() -> None:
    adapters = kept(100, a1=40, a2=40, a3=20)
    assert adapters.to_drop(0, set()) == []
    assert adapters.to_drop(30, set()) == [1]
    assert adapters.to_drop(60, set()) == [1, 2]
    adapters.nbytes.move_to_end(1)
    assert adapters.to_drop(30, set()) == [2]


def test_what_a_request_needs_stays() -> None:
    """Even above the limit: dropping it would fail the request in the middle of a step."""
    adapters = kept(100, a1=40, a2=40, a3=20)
    assert adapters.to_drop(30, {1}) == [2]
    assert adapters.to_drop(500, {1, 2, 3}) == []
    assert kept(0, a1=1).to_drop(5, {7}) == [1]


def test_the_limit_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEEP_VARIABLE, raising=False)
    assert keep_limit() == 4 * 2**30
    monkeypatch.setenv(KEEP_VARIABLE, "0.5")
    assert keep_limit() == 2**29
    for wrong in ("-1", "much", "inf", "nan", ""):
        monkeypatch.setenv(KEEP_VARIABLE, wrong)
        with pytest.raises(ValueError, match=KEEP_VARIABLE):
            keep_limit()


def test_sums_that_requests_use_take_no_more_memory_than_adapters_may(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LEAST_BYTES", 0)
    monkeypatch.setenv(SUMS_VARIABLE, "1")
    monkeypatch.setenv(KEEP_VARIABLE, str(64 / 2**30))  # two of them
    core.write("a", 1.0)
    add_lora(None, core, LoadRequest("a", 1, "a"))
    for manager in core.managers:
        read = manager._load_adapter
        monkeypatch.setattr(
            manager, "_load_adapter", lambda request, read=read: read(msgspec.structs.replace(request, lora_path="a"))
        )

    def summed(number: int) -> LoadRequest:
        return LoadRequest(f"{number}*a", number, f"soka-sum:{json.dumps([[number, 'a', 1, 'a', False, 0]])}")

    assert ask(core, "first", summed(7)) is not None
    assert ask(core, "second", summed(8)) is not None
    assert ask(core, "third", summed(8)) is not None
    with pytest.raises(ValueError, match="take 64 of 64"):
        add_lora(None, core, summed(9))
    assert ask(core, "fourth", summed(9)) is None
    assert core.refused == ["fourth"]
    assert list(core._soka_adapters.sums) == [7, 8]  # type: ignore[attr-defined]
    assert ask(core, "other", LoadRequest("2*a", 8, summed(9).lora_path)) is None  # the number is taken
    del core.scheduler.requests["first"]
    assert ask(core, "fifth", summed(9)) is not None
    assert list(core._soka_adapters.sums) == [8, 9]  # type: ignore[attr-defined]
    core.scheduler.requests.clear()
    assert ask(core, "last", summed(10)) is not None
    assert list(core._soka_adapters.sums) == [10]  # type: ignore[attr-defined]
