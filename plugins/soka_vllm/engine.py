"""Loading adapters, seen from the engine: all workers or none, and never in the middle of a worker's forward pass.

In vLLM up to 0.32, and without this, one bad adapter under tensor parallelism makes later good ones fail (the executor
stops at the first worker's error and leaves the replies of the others unread), an evicted adapter whose files are gone
ends the engine when it is asked for, and new weights under a known name and path are answered from the prefix cache of
the old ones. Runs in the engine's process; see `soka_vllm.store` for the workers'.

From vLLM 0.34 on the engine takes requests in while it waits for a step's output. An adapter that is read for one of
them is read between that step's forward pass and its sampling: no factors in a slot change by it.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from soka_vllm import store
from soka_vllm.base import check_base
from soka_vllm.limits import LEAST_BYTES
from soka_vllm.places import adapter_directory, limited, roots_of
from soka_vllm.settings import KEEP_VARIABLE, SUMS_VARIABLE, keep_limit, sums_limit
from soka_vllm.sums import is_sum, members_in, members_of

_logger = logging.getLogger("vllm.soka")

# By adapter id, of the engine of this process that has loaded it last: keys of the prefix cache are made in another
# thread, and nothing there names the engine. They are made again where that was another engine.
_fingerprints: dict[int, str] = {}

# On a request that the engine has let in: what its keys have of its adapter's contents.
_KEY = "soka_key"
_mixed = itertools.count(1)


@dataclass
class EngineAdapters:
    """Adapters that an engine's workers keep in memory, by adapter id, least recently used first."""

    limit: int
    most_sums: int = 0
    nbytes: OrderedDict[int, int] = field(default_factory=OrderedDict)
    # Of the contents of all that were ever loaded.
    fingerprints: dict[int, str] = field(default_factory=dict)
    # Of all that were ever loaded: where their files must lie, whenever they are read again. None: anywhere.
    roots: dict[int, Sequence[Path] | None] = field(default_factory=dict)
    # Of the sums among those in memory: their paths, least recently used first.
    sums: OrderedDict[int, str] = field(default_factory=OrderedDict)
    # Sums of which an adapter was loaded again, and adapters that were removed: read again when they are asked for.
    stale: set[int] = field(default_factory=set)

    def touch(self, number: int) -> None:
        """Note that an adapter was used."""
        self.nbytes.move_to_end(number)
        if number in self.sums:
            self.sums.move_to_end(number)

    def forget(self, number: int) -> None:
        """Note that the workers drop an adapter; of a sum, of which anyone can ask for any number, nothing is kept."""
        del self.nbytes[number]
        self.stale.discard(number)
        if self.sums.pop(number, None) is not None:
            self.forget_contents(number)

    def forget_contents(self, number: int) -> None:
        """Forget what an id stands for."""
        self.roots.pop(number, None)
        self.fingerprints.pop(number, None)
        _fingerprints.pop(number, None)

    def note_changed(self, number: int) -> None:
        """Note that the sums of an adapter are of what it was before."""
        sums = self.sums.items()
        self.stale |= {other for other, path in sums if any(m.number == number for m in members_in(path))}

    def check_number(self, number: int, path: str) -> None:
        """Refuse a sum whose number another one in memory has: ValueError."""
        if self.sums.get(number, path) != path:
            raise ValueError("another sum of adapters has its number; change a scale in a digit that does not matter")

    def sums_to_drop(self, needed: set[int]) -> list[int]:
        """Sums to evict for another one: the least recently used that no request needs."""
        surplus = len(self.sums) + 1 - self.most_sums
        return [number for number in self.sums if number not in needed][: max(surplus, 0)]

    def check_room(self, nbytes: int, dropped: Container[int]) -> None:
        """Refuse another sum of `nbytes` beside those that stay in memory.

        Any client can ask for sums without end, and those of requests that wait are needed.

        Raises:
            ValueError: they would take more than adapters may.
        """
        staying = sum(self.nbytes[number] for number in self.sums if number not in dropped)
        room = max(self.limit, LEAST_BYTES)
        if staying and staying + nbytes > room:
            raise ValueError(
                f"it takes {nbytes} bytes, and sums of adapters that requests use take {staying} of {room}; ask again "
                f"when some have ended, or start the server with a larger {KEEP_VARIABLE}"
            )

    def to_drop(self, nbytes: int, needed: set[int]) -> list[int]:
        """Adapters to evict for another of `nbytes`: the least recently used that no request needs."""
        dropped = []
        free = self.limit - sum(self.nbytes.values()) - nbytes
        for number, size in self.nbytes.items():
            if free >= 0:
                break
            if number not in needed:
                dropped.append(number)
                free += size
        return dropped


def reading_limits(stock: None, core: Any) -> list[int]:
    """EngineCore.soka_limits, the plugin's own: the widest limits of the workers, called by name from the API."""
    return [max(numbers) for numbers in zip(*core.model_executor.collective_rpc(store.limits), strict=True)]


def add_lora(stock: Any, core: Any, lora_request: Any) -> bool:
    """EngineCore.add_lora: load an adapter for serving.

    Raises:
        ValueError: why it is refused; every worker serves what it served before.
    """
    adapters, number = _adapters(core), lora_request.lora_int_id
    anew = lora_request.load_inplace or number not in adapters.nbytes or number in adapters.stale
    _load(core, lora_request, roots_of(lora_request), anew=anew, activate=True)
    return True


def remove_lora(stock: Callable[[Any, int], bool], core: Any, lora_id: int) -> bool:
    """EngineCore.remove_lora: forget an adapter; its id may stand for another one then.

    What a request uses stays in the workers' memory until its id is loaded again: else a step would read files.
    """
    adapters = _adapters(core)
    known = lora_id in adapters.nbytes and lora_id not in adapters.stale
    adapters.note_changed(lora_id)
    if lora_id in _needed(core):
        adapters.roots.pop(lora_id, None)
        adapters.stale.add(lora_id)
    else:
        core.model_executor.collective_rpc(store.forget, args=([lora_id],))
        if lora_id in adapters.nbytes:
            adapters.forget(lora_id)
        adapters.forget_contents(lora_id)
    return stock(core, lora_id) or known


def add_request(stock: Callable[[Any, Any, int], None], core: Any, request: Any, request_wave: int = 0) -> None:
    """EngineCore.add_request: load the request's adapter first.

    Its adapter is brought back into memory if need be; if that fails, this request alone is refused. `load_inplace` in
    the request of a program that runs the engine itself reads the adapter again; those of servers have it cleared.
    """
    lora_request = request.lora_request
    if lora_request is not None:
        adapters = _adapters(core)
        number = lora_request.lora_int_id
        try:
            anew = lora_request.load_inplace or number in adapters.stale
            if number in adapters.nbytes and not anew:
                if is_sum(lora_request.lora_path):
                    adapters.check_number(number, lora_request.lora_path)
                adapters.touch(number)
            else:
                _load(core, lora_request, adapters.roots.get(number), anew=anew, activate=False)
        except Exception as error:  # whatever it is, the other requests have nothing to do with it
            _logger.error("Request %s is refused, adapter %r: %s", request.request_id, lora_request.lora_name, error)
            if not _answer_refused(core, request, error):
                raise
            return
        # Reloaded since it was hashed, or meanwhile; or hashed by a front end, which vLLM from 0.34 on takes over.
        fingerprint = adapters.fingerprints[number]
        if getattr(request, "soka_fingerprint", None) != fingerprint:
            _hash_again(request, fingerprint)
        else:
            setattr(request, _KEY, fingerprint)
    stock(core, request, request_wave)


def check_served_base(lora_request: Any, model_config: Any) -> None:
    """Refuse an adapter that was made for other weights than a vLLM ModelConfig names; see `check_base`."""
    if is_sum(lora_request.lora_path):
        return  # its members were held against the base
    roots = roots_of(lora_request)
    directory = adapter_directory(lora_request.lora_path, roots)
    check_base(directory, model_config.model, model_config.revision, roots)


def prefix_keys(stock: Any, request: Any) -> list[tuple[str, ...]]:
    """kv_cache_utils._gen_lora_extra_hash_keys: extra keys of a request's prefix-cache blocks.

    vLLM's own leave out the adapter's contents.
    """
    lora_request = request.lora_request
    if lora_request is None:
        return []
    key = getattr(request, _KEY, None)
    if key is None:
        key = _fingerprints.get(lora_request.lora_int_id, "")
        # What all its blocks have; None where they differ, since the adapter was loaded again between two of them.
        request.soka_fingerprint = key if getattr(request, "soka_fingerprint", key) == key else None
    return [("lora", lora_request.lora_name, lora_request.lora_path, key)]


def _hash_again(request: Any, key: str) -> None:
    """Make a request's keys anew, and all later ones, with `key` for its adapter's contents."""
    setattr(request, _KEY, key)
    request.block_hashes.clear()
    request.update_block_hashes()


def _hash_all_again(core: Any, number: int) -> None:
    """After an adapter's contents changed: new keys for the prefix-cache blocks of requests that are in the scheduler.

    What has not been computed yet will be with the new contents. Of what has begun, blocks hold values of both, which
    no other request may find: those get a key that no other request has.
    """
    for request in core.scheduler.requests.values():
        if request.lora_request is None or request.lora_request.lora_int_id != number:
            continue
        begun = getattr(request, "num_computed_tokens", 0)
        _hash_again(request, _adapters(core).fingerprints[number] + (f" {next(_mixed)}" if begun else ""))


def _answer_refused(core: Any, request: Any, error: Exception) -> bool:
    """Tell a request's client that its adapter is refused; False for an engine in the caller's own process."""
    requests, client = [request.request_id], request.client_index
    finish = getattr(core, "_send_finish_outputs_to_client", None)
    if finish is not None and "error" in inspect.signature(finish).parameters:  # from vLLM 0.33 on, with the reason
        from vllm.v1.engine import FinishReason

        reason = sys.modules["vllm.outputs"].RequestError(code="adapter_refused", message=str(error))
        finish(requests, client, FinishReason.ERROR, reason)
        return True
    answer = getattr(core, "_send_error_outputs_to_client", None)
    if answer is not None:
        answer(requests, client)
    return answer is not None


def _adapters(core: Any) -> EngineAdapters:
    if "_soka_adapters" not in core.__dict__:
        core._soka_adapters = EngineAdapters(keep_limit(), sums_limit())
    adapters = core._soka_adapters
    assert isinstance(adapters, EngineAdapters)
    return adapters


def _needed(core: Any) -> set[int]:
    """Ids of the adapters that requests use."""
    return {r.lora_request.lora_int_id for r in core.scheduler.requests.values() if r.lora_request is not None}


def _bring_members(core: Any, lora_request: Any, roots: Sequence[Path] | None) -> frozenset[int]:
    """Have the members of a sum in the workers' memory; returns their ids, none of an adapter that is no sum."""
    members = members_of(lora_request)
    if not members:
        return frozenset()
    adapters, number = _adapters(core), lora_request.lora_int_id
    if not adapters.most_sums:
        raise ValueError(f"{SUMS_VARIABLE} is 0, so sums of adapters are not served")
    adapters.check_number(number, lora_request.lora_path)
    numbers = frozenset(member.number for member in members)
    for member in members:
        anew = member.number in adapters.stale
        if member.number in adapters.nbytes and not anew:
            adapters.touch(member.number)
            continue
        where = adapters.roots.get(member.number, roots)
        try:
            _load(core, member.request(), where, anew=anew, activate=False, beside=numbers)
        except ValueError as error:
            raise ValueError(f"`{member.name}`: {error}") from error
    return numbers


def _load(
    core: Any,
    lora_request: Any,
    roots: Sequence[Path] | None,
    *,
    anew: bool,
    activate: bool,
    beside: frozenset[int] = frozenset(),
) -> None:
    """Load an adapter in all workers, or in none.

    Args:
        roots: folders in which its files must lie; None: anywhere.
        anew: read the files even if the workers have it in memory.
        activate: put it into a slot at once.
        beside: ids of adapters that must stay in memory.
    """
    adapters, number = _adapters(core), lora_request.lora_int_id
    executor = core.model_executor
    members = _bring_members(core, lora_request, roots)
    request = limited(lora_request, roots)
    check_served_base(request, core.vllm_config.model_config)
    readings: Sequence[store.ReadResult] = executor.collective_rpc(store.read, args=(request, anew))
    refusals = dict.fromkeys(reading.refusal for reading in readings if reading.refusal)
    if refusals:
        raise ValueError("\n".join(refusals))
    found = [reading.fingerprint for reading in readings]
    fingerprint = found[0]
    if len(set(found)) > 1:
        if not core.vllm_config.parallel_config.enable_expert_parallel:
            raise ValueError(
                f"{lora_request.lora_path}: workers read different contents; was it being written? load again"
            )
        fingerprint = xxhash.xxh3_128(" ".join(found).encode()).hexdigest()  # each has read its own experts
    changed = adapters.fingerprints.get(number, fingerprint) != fingerprint
    if changed and not activate and not anew:
        raise ValueError(f"{lora_request.lora_path} has changed since it was loaded; load it again (load_inplace)")
    nbytes = max(reading.nbytes for reading in readings)
    needed = _needed(core) | members | beside | {number}
    drop = adapters.to_drop(nbytes - adapters.nbytes.get(number, 0), needed)
    if members and number not in adapters.sums:
        drop += [other for other in adapters.sums_to_drop(needed) if other not in drop]
        adapters.check_room(nbytes, drop)
    failures = dict.fromkeys(filter(None, executor.collective_rpc(store.take, args=(lora_request, activate, drop))))
    for other in drop:
        adapters.forget(other)
    if failures:
        executor.collective_rpc(store.undo, args=(lora_request,))
        raise ValueError("\n".join(failures))
    adapters.nbytes[number] = nbytes
    adapters.nbytes.move_to_end(number)
    adapters.roots[number] = roots
    if members:
        adapters.sums[number] = lora_request.lora_path
        adapters.sums.move_to_end(number)
    if anew:
        adapters.stale.discard(number)
    adapters.fingerprints[number] = _fingerprints[number] = fingerprint
    if changed:
        adapters.note_changed(number)
        _hash_all_again(core, number)
