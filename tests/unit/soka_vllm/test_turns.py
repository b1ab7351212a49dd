"""Whose turn it is past --max-loras: which waiting requests a step may not admit, and where they wait meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from soka_vllm import turns
from soka_vllm.settings import TURN_VARIABLE, turn_seconds
from soka_vllm.turns import Turns, schedule


class Queue(list[Any]):
    """The methods of vLLM's RequestQueue that count here."""

    def add_request(self, request: Any) -> None:
        self.append(request)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        names = {r.name for r in requests}
        self[:] = [r for r in self if r.name not in names]


def request(name: str, adapter: int, came: float, **more: Any) -> Any:
    lora = SimpleNamespace(lora_int_id=adapter) if adapter else None
    fields = {"priority": 0, "num_preemptions": 0, "status": SimpleNamespace(name="WAITING"), **more}
    return SimpleNamespace(name=name, lora_request=lora, arrival_time=came, **fields)


class Scheduler:
    """What counts here of vLLM's."""

    def __init__(self, running: list[Any], waiting: list[Any], slots: int, policy: str) -> None:
        self.running, self.waiting = running, Queue(waiting)
        self.lora_config: Any = SimpleNamespace(max_loras=slots)
        self.policy = SimpleNamespace(value=policy)
        self.apart: list[Any] = []

    @property
    def requests(self) -> dict[str, Any]:
        return {r.name: r for r in (*self.running, *self.waiting, *self.apart)}


def scheduler(running: list[Any], waiting: list[Any], slots: int = 2, policy: str = "fcfs") -> Any:
    return Scheduler(running, waiting, slots, policy)


def admit(core: Any) -> list[str]:
    """What a step of vLLM's does with adapters."""
    admitted = []
    active = {r.lora_request.lora_int_id for r in core.running if r.lora_request}
    for one in list(core.waiting):
        adapter = one.lora_request.lora_int_id if one.lora_request else 0
        if adapter and adapter not in active and len(active) == core.lora_config.max_loras:
            continue
        active |= {adapter} - {0}
        core.waiting.remove(one)
        core.running.append(one)
        admitted.append(one.name)
    return admitted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the plugin sees."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now.s))
    monkeypatch.delenv(TURN_VARIABLE, raising=False)
    return now


def test_a_greedy_client_makes_room(clock: SimpleNamespace) -> None:
    """Two adapters that are asked for again at each step: without turns the third would never be admitted."""
    core = scheduler([request("a", 1, 0), request("b", 2, 0)], [request("c", 3, 0)])
    seen: dict[str, float] = {}
    for step in range(60):
        clock.s = step / 10
        core.waiting += [request(f"{name}{step}", adapter, clock.s) for adapter, name in enumerate("0ab")]
        for name in schedule(admit, core):
            seen[name] = clock.s
        if step % 3 == 0:  # the oldest of each adapter is done: at any time some of each are under way
            for adapter in (1, 2):
                own = [r for r in core.running if r.lora_request and r.lora_request.lora_int_id == adapter]
                for done in own[: max(1, len(own) - 2)]:
                    core.running.remove(done)
        core.running[:] = [r for r in core.running if r.lora_request]
    assert 1.0 <= seen["c"] <= 2.0
    assert all(seen[f"0{step}"] == step / 10 for step in range(60))  # the base waits for nobody
    assert max(seen.values()) == 5.9


def test_only_the_oldest_adapters_are_closed_and_only_as_many_as_are_needed(clock: SimpleNamespace) -> None:
    rule = Turns(1.0)
    core = scheduler([request("a", 1, 0)], [], slots=2)
    assert rule.held(core, 0.0) == []
    core.running.append(request("b", 2, 0))
    core.waiting += [request("c", 3, 0.5), request("a2", 1, 0.6), request("b2", 2, 0.6), request("0", 0, 0.6)]
    assert rule.held(core, 0.6) == []
    assert rule.held(core, 1.5) == []  # c waits since it was seen first, at 0.6
    assert [r.name for r in rule.held(core, 1.6)] == ["a2"]
    core.waiting.append(request("d", 4, 0.6))
    assert [r.name for r in rule.held(core, 1.7)] == ["a2"]
    assert [r.name for r in rule.held(core, 2.7)] == ["a2", "b2"]  # d is overdue, too
    del core.running[0]  # the first has left: a slot is free, and one more is needed
    assert [r.name for r in rule.held(core, 2.8)] == ["b2"]


def test_many_waiting_requests_are_not_looked_at_in_every_step(clock: SimpleNamespace) -> None:
    """A job of 5,000 requests for one adapter: to look at all of them takes as long as a small model's step."""

    class Looks(dict[str, Any]):
        count = 0

        def values(self) -> Any:
            self.count += 1
            return super().values()

    stock = scheduler([request("a", 1, 0)], [request(f"a{i}", 1, 0) for i in range(5_000)], slots=1)
    looks = Looks(stock.requests)
    core: Any = SimpleNamespace(**vars(stock), requests=looks)
    rule = Turns(1.0)
    assert [rule.held(core, step / 100) for step in range(100)] == [[]] * 100
    assert looks.count == 2
    looks["b"] = request("b", 2, 0)
    found = [step for step in range(100, 320) if rule.held(core, step / 100)]
    assert 200 <= found[0] <= 300  # seen within half a second, it waits for a turn, and half a second more at most
    assert found == list(range(found[0], 320))  # from then on in each step: who asks for "a" is held


def test_a_turn_lasts_as_long_as_the_wait_for_it(clock: SimpleNamespace) -> None:
    rule = Turns(1.0)
    core = scheduler([request("a", 1, 0)], [request("b", 2, 0), request("a2", 1, 0)], slots=1)
    core.waiting[0].soka_waits_since = -9.0
    assert rule.held(core, 0.0) == []
    assert rule.held(core, 0.9) == []
    assert [r.name for r in rule.held(core, 1.0)] == ["a2"]


def test_what_waits_for_something_else_closes_nobody(clock: SimpleNamespace) -> None:
    rule = Turns(1.0)
    other = SimpleNamespace(name="WAITING_FOR_STREAMING_REQ")
    core = scheduler([request("a", 1, 0)], [request("b", 2, 0, status=other), request("a2", 1, 0)], slots=1)
    rule.held(core, 0.0)
    assert rule.held(core, 2.0) == []
    core.waiting[0].status = SimpleNamespace(name="WAITING")
    assert rule.held(core, 3.0) == []
    assert [r.name for r in rule.held(core, 4.0)] == ["a2"]


def test_requests_whose_grammar_is_ready_in_the_same_step_are_held_too(clock: SimpleNamespace) -> None:
    """vLLM admits them in the step in which it sees them first: a client that asks for JSON would keep others out."""
    rule = Turns(1.0)
    grammar = SimpleNamespace(name="WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR")
    waiting = [request("b", 2, 0), request("a2", 1, 0, status=grammar)]
    core = scheduler([request("a", 1, 0)], waiting, slots=1)
    rule.held(core, 0.0)
    assert [r.name for r in rule.held(core, 2.0)] == ["a2"]


def test_the_bound_holds_and_counts_a_request_s_own_adapter(clock: SimpleNamespace) -> None:
    """T + ceil(A / S) * (T + D), for the last of A adapters that come together beside S that are always asked for."""
    length, turn = 3.0, 1.0
    for slots, adapters in ((1, 1), (1, 3), (2, 2), (2, 3), (4, 1), (4, 4), (4, 5)):
        core = scheduler([], [], slots=slots)
        ends: dict[str, float] = {}
        admitted: dict[str, float] = {}
        for step in range(400):
            clock.s = step / 10
            core.running[:] = [r for r in core.running if ends[r.name] > clock.s]
            if step % 5 == 0:  # while one of them runs the next one comes
                core.waiting += [request(f"{a} {step}", a, clock.s) for a in range(1, slots + 1)]
            if step == 100:
                core.waiting += [request(f"late {i}", 100 + i, clock.s) for i in range(adapters)]
            for name in schedule(admit, core):
                ends[name] = clock.s + length
                admitted[name] = clock.s
        waited = admitted[f"late {adapters - 1}"] - 10.0
        assert turn < waited <= turn + -(-adapters // slots) * (turn + length), (slots, adapters)


def test_what_has_run_and_what_is_more_urgent_goes_on(clock: SimpleNamespace) -> None:
    rule = Turns(1.0)
    waiting = [request("b", 2, 0, priority=5), request("a2", 1, 0, num_preemptions=1), request("a3", 1, 0, priority=4)]
    core = scheduler([request("a", 1, 0)], [*waiting, request("a4", 1, 0, priority=5)], slots=1, policy="priority")
    rule.held(core, 0.0)
    assert [r.name for r in rule.held(core, 2.0)] == ["a4"]
    core.policy.value = "fcfs"  # where priorities mean nothing
    assert [r.name for r in rule.held(core, 2.0)] == ["a3", "a4"]


def test_held_requests_keep_their_place_also_when_a_step_fails(clock: SimpleNamespace) -> None:
    waiting = [request("b", 2, 1), request("a2", 1, 2), request("b2", 2, 3), request("a3", 1, 4)]
    core = scheduler([request("a", 1, 0)], waiting, slots=1)
    schedule(lambda core: None, core)
    clock.s = 2.0

    def fail(core: Any) -> None:
        assert [r.name for r in core.waiting] == ["b", "b2"]
        core.waiting.insert(0, request("p", 1, 0.5, num_preemptions=1))  # vLLM puts what it preempts in front
        raise RuntimeError("a step")

    with pytest.raises(RuntimeError, match="a step"):
        schedule(fail, core)
    assert [r.name for r in core.waiting] == ["p", "b", "a2", "b2", "a3"]


def test_requests_that_wait_apart_for_blocks_from_elsewhere_are_held_too(clock: SimpleNamespace) -> None:
    """vLLM's third queue, from 0.34 on under --max-num-inflight-kv-loads."""
    core = scheduler([request("a", 1, 0)], [request("b", 2, 1)], slots=1)
    core.async_kv_waiting = Queue([request("a2", 1, 2), request("b2", 2, 3)])
    core.apart = core.async_kv_waiting
    schedule(lambda core: None, core)
    clock.s = 2.0
    assert schedule(lambda core: [r.name for r in core.async_kv_waiting], core) == ["b2"]
    assert [r.name for r in core.async_kv_waiting] == ["a2", "b2"]
    assert [r.name for r in core.waiting] == ["b"]


def test_without_adapters_or_with_zero_seconds_it_is_vllm_s_order(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, slots in (("0", 1), ("1", 0)):
        monkeypatch.setenv(TURN_VARIABLE, seconds)
        core = scheduler([request("a", 1, 0)], [request("b", 2, 0), request("a2", 1, 0)], slots=1)
        core.lora_config = core.lora_config if slots else None
        clock.s = 0.0
        schedule(lambda core: None, core)
        clock.s = 9.0
        assert schedule(lambda core: [r.name for r in core.waiting], core) == ["b", "a2"]


def test_the_seconds_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TURN_VARIABLE, raising=False)
    assert turn_seconds() == 1.0
    monkeypatch.setenv(TURN_VARIABLE, "0.25")
    assert turn_seconds() == 0.25
    for wrong in ("-1", "soon", "inf", "nan", ""):
        monkeypatch.setenv(TURN_VARIABLE, wrong)
        with pytest.raises(ValueError, match=TURN_VARIABLE):
            turn_seconds()
