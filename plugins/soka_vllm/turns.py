"""Whose turn it is, where requests ask for more adapters than a step can have (`--max-loras`).

vLLM admits a request whose adapter is in the running batch and passes over those whose adapter is not, once there are
as many as a step can have: who never stops asking for the same adapters keeps all others out for good. Here a request
that has waited for so many seconds makes room. The adapter that has been in the batch for longest, for as many seconds
at least, is closed: what runs of it goes on, and new requests for it wait until it has left the batch and come again.

A request then waits at most T + ceil(A / S) * (T + D) seconds before it is admitted, with T the seconds, A the adapters
that wait, its own and those that were asked for before it, S = `--max-loras`, and D the longest time that a running
request takes. What waits for other reasons (`--max-num-seqs`, memory for the KV cache) waits as vLLM has it.

To look at n waiting requests takes about n microseconds, so that it is done once in n / 10 ms or T, whichever is less,
and not in every step. Each T in the bound is longer by up to as much, and the first by up to twice as much.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from soka_vllm.settings import turn_seconds

_SINCE = "soka_waits_since"  # on vLLM's Request: when it was first seen waiting

_READY = ("WAITING", "PREEMPTED")  # others wait for something else: their grammar, their input, blocks from elsewhere
# vLLM admits these in the step in which it finds their grammar ready.
_MAY_BE_READY = "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"
# Where requests wait that a step may admit. The second is vLLM's up to 0.30, for those that it has passed over; the
# third from 0.34 on, for those whose blocks may come from elsewhere. What it keeps in `kv_holding_waiting` has blocks.
QUEUES = ("waiting", "skipped_waiting", "async_kv_waiting")
_LOOK_SECONDS = 1e-4  # between two looks at all waiting requests, for each of them: a look takes a hundredth of that


class Turns:
    """Turns of the adapters of one scheduler.

    Args:
        seconds: that a request waits before it makes room, and that an adapter has at least; 0: vLLM's order.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began: dict[int, float] = {}  # when each adapter of the running batch came into it
        self._next_look = float("-inf")

    def held(self, scheduler: Any, now: float) -> list[Any]:
        """The waiting requests that this step must not admit.

        Args:
            scheduler: vLLM's, before a step.
            now: seconds.
        """
        running = {_adapter(request) for request in scheduler.running} - {0}
        self._began = {adapter: self._began.get(adapter, now) for adapter in running}
        waiting = len(scheduler.requests) - len(scheduler.running)
        if not waiting or now < self._next_look:
            return []
        self._next_look = now + min(self.seconds, waiting * _LOOK_SECONDS)
        admitted = set(map(id, scheduler.running))
        overdue: dict[int, int] = {}  # adapter: the most urgent priority of its requests
        inside = []
        for request in scheduler.requests.values():
            status = request.status.name
            if id(request) in admitted or status not in (*_READY, _MAY_BE_READY):
                continue
            adapter = _adapter(request)
            if adapter in running:
                inside.append(request)
            if status == _MAY_BE_READY:
                continue
            since = request.__dict__.setdefault(_SINCE, now)
            if adapter and adapter not in running and now - since >= self.seconds:
                overdue[adapter] = min(request.priority, overdue.get(adapter, request.priority))
        wanted = len(overdue) - (scheduler.lora_config.max_loras - len(running))
        if wanted <= 0:
            return []
        longest = sorted(running, key=self._began.__getitem__)[:wanted]
        closed = {adapter for adapter in longest if now - self._began[adapter] >= self.seconds}
        if closed:
            self._next_look = now  # who asks for one of them meanwhile is held, too
        # Where requests have priorities, none waits for a less urgent one.
        most = min(overdue.values()) if scheduler.policy.value == "priority" else None
        return [
            request
            for request in inside
            if _adapter(request) in closed
            and not request.num_preemptions  # it has run and holds up whoever waits for its adapter to leave
            and (most is None or request.priority >= most)
        ]


def schedule(stock: Any, scheduler: Any, *arguments: Any, **options: Any) -> Any:
    """Scheduler.schedule: a step, without the waiting requests that must let others have their turn."""
    if scheduler.lora_config is None:
        return stock(scheduler, *arguments, **options)
    if "_soka_turns" not in scheduler.__dict__:
        scheduler._soka_turns = Turns(turn_seconds())
    turns = scheduler._soka_turns
    held = turns.held(scheduler, time.monotonic()) if turns.seconds else []
    taken = [(queue, _take_out(queue, held)) for queue in _queues(scheduler)] if held else []
    try:
        return stock(scheduler, *arguments, **options)
    finally:
        for queue, requests in taken:
            _put_back(queue, requests)


def _queues(scheduler: Any) -> list[Any]:
    return [queue for queue in (getattr(scheduler, name, None) for name in QUEUES) if queue is not None]


def _take_out(queue: Any, held: Iterable[Any]) -> list[Any]:
    chosen = set(map(id, held))
    found = [request for request in queue if id(request) in chosen]
    queue.remove_requests(found)
    return found


def _put_back(queue: Any, requests: list[Any]) -> None:
    """Behind those that were preempted, by the time they came; vLLM's other queue orders itself."""
    if not requests:
        return
    there = list(queue)
    queue.remove_requests(there)
    for request in sorted([*there, *requests], key=lambda r: (r.num_preemptions == 0, r.arrival_time)):
        queue.add_request(request)


def _adapter(request: Any) -> int:
    """The id of a request's adapter; 0 for the base."""
    return 0 if request.lora_request is None else int(request.lora_request.lora_int_id)
