"""10,000 adapters that share slots and host memory: who finds theirs, who waits. Simulated. For `simulate_fleet.py`.

**Caches.** What vLLM 0.32 does with a request's adapter (`LRUCacheWorkerLoRAManager.add_adapter`, called at each step
for each adapter of the batch): it looks among the `max_cpu_loras` adapters on the host; if it is not there it is read
from files, and the one used longest ago is dropped, from its slot too. Then it looks in the `max_loras` slots; if it is
not there it takes a free one, or that of the adapter used longest ago. A use makes an adapter the last used in both
caches. Hence the slots hold those last used of the ones on the host, and a request finds its adapter in a slot (on the
host) if fewer than max_loras (max_cpu_loras) others were used since its last use. That number is worked out once for
every request of a stream, and answers for all sizes of both caches. With the plugin, files are read when a request
arrives, not in a step, and what spares the reading is SOKA_KEEP_ADAPTERS_GIB (4 per worker) over the bytes of an
adapter: an LRU as well, refreshed by each request, whatever max_cpu_loras is. So a `host` of 4,000 means
max_cpu_loras = 4000 without the plugin, and a SOKA_KEEP_ADAPTERS_GIB that holds 4,000 with it (plus those that vLLM's
own cache still holds when the plugin has dropped them).

Simplified: requests draw from 10,000 adapters with probabilities 1/k^exponent, each on its own (no bursts, no habits),
one after the other (in a server, adapters are refreshed for as long as they are in the batch). The caches start in
their stationary state, drawn exactly, so cold starts, which read every adapter once, are left out. "che" is the
approximation of Che, Tung and Wang (2002); "se" is the standard error over independent seeds. `added_ms` is the time of
loading that a request causes on average: share of host hits x time from cache + share of misses x time from disk, as
measured for the 100M model on a CPU, one thread, processor time, files in the page cache. For other models both are
scaled by the adapters' bytes. That exaggerates: from the embedded base to the 100M model SoKA's values grow 17 times
and its time from disk 1.9 times. Scaled by the number of modules (3 times there) it would be less; `load_times` has
all three. Loads take place in the engine's loop or in a step, so that everybody who is being served waits; this is not
added, nor are registries that are slower than a disk, and transfers over PCIe.

`bookkeeping_ms`, measured: what one call of add_adapter takes here for an adapter that is in a slot, in processor time.
vLLM 0.32 copies the list of all adapters on the host for each adapter of each step.

**Waiting.** A step may have at most max_loras distinct adapters. vLLM's scheduler goes through the waiting requests in
order, and leaves for later those whose adapter is one too many; requests behind them whose adapter is in the batch
overtake. "burst": so many requests at once to an idle server, and the share that is not in the first step. "closed": so
many users, each of whom asks again once answered, for an adapter drawn anew; the share that cannot start at once, the
mean wait of all in mean lengths of an answer, and how many users are being served. Simplified: lengths are exponential,
a step is short against them, memory and max_num_seqs limit nothing, and loading takes no time.

Checked: each request's outcome against vLLM's own managers and the plugin's engine; hit rates against Che; distinct
adapters of a burst against their expectation; waits against Little.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from eval.fleet.memory import METHODS, TIMED, Model, host_bytes  # before vLLM: it sets the environment
from soka_vllm.engine import EngineAdapters

SEEDS = list(range(8))
EXPONENTS = (0.6, 0.8, 1.0, 1.2)
ADAPTERS = 10_000
SLOT_COUNTS = (8, 32, 64, 128, 256)
HOST_COUNTS = (256, 1000, 4000, 10_000)
CONCURRENT = (64, 256)
TRACE = 1 << 18  # uses of adapters in a stream, of which the first ADAPTERS set up the caches
BURSTS = 250  # per seed
COMPLETIONS = 25_000  # per seed of the closed system, after WARM_UP more
WARM_UP = 5_000

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def popularity(exponent: float) -> Floats:
    """Probability of each adapter."""
    weights = np.arange(1, ADAPTERS + 1, dtype=np.float64) ** -exponent
    chances: Floats = weights / weights.sum()
    return chances


def draw(chances: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Adapters of independent requests."""
    return np.minimum(np.searchsorted(chances.cumsum(), rng.random(count)), ADAPTERS - 1).astype(np.int64)


def stream(chances: Floats, rng: np.random.Generator) -> Ints:
    """Uses of adapters: first one of each, after which their order is a stationary one, then requests."""
    # Sorted by exponential clocks, the adapters are a draw without replacement: the first is the one last used.
    last_used_first = np.argsort(rng.exponential(size=ADAPTERS) / chances)
    return np.concatenate([last_used_first[::-1], draw(chances, TRACE - ADAPTERS, rng)])


def smaller_before(order: Ints) -> Ints:
    """For each number of a permutation whose length is a power of two, how many smaller ones stand before it.

    From the highest bit down: of numbers that agree in the bits above, those with a 0 are smaller than those with a 1.
    """
    counts = np.zeros_like(order)
    values, width = order, len(order)
    while width > 1:
        rows = values.reshape(-1, width)
        high = (rows & (width // 2)) != 0
        counts[rows[high]] += np.cumsum(~high, axis=1)[high]
        halves = [rows[~high].reshape(-1, width // 2), rows[high].reshape(-1, width // 2)]
        values, width = np.concatenate(halves, axis=1).ravel(), width // 2
    return counts[order]


def distances(uses: Ints) -> Ints:
    """For each use, how many adapters were used since its last one, itself included; of first uses more than any.

    A cache of so many adapters, or more, has it. Of the uses k since, those count whose own last one is not since.
    """
    by_adapter = np.argsort(uses, kind="stable")
    again = uses[by_adapter[1:]] == uses[by_adapter[:-1]]
    last = np.full(len(uses), -1, dtype=np.int64)
    last[by_adapter[1:][again]] = by_adapter[:-1][again]
    order = np.empty_like(last)
    order[np.argsort(last, kind="stable")] = np.arange(len(last))
    return np.where(last < 0, np.iinfo(np.int64).max, smaller_before(order) - last)


def che(chances: Floats, capacity: int) -> float:
    """Hit rate of an LRU cache after Che: an adapter is there if it was asked for within the cache's typical time."""
    if capacity >= len(chances):
        return 1.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-chances * high)).sum() < capacity:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-chances * middle)).sum() < capacity else (low, middle)
    return float((chances * (1 - np.exp(-chances * high))).sum())


def hit_rates(exponent: float) -> list[dict[str, Any]]:
    """Of every cache size that is asked for, simulated and after Che."""
    chances = popularity(exponent)
    capacities = sorted({*SLOT_COUNTS, *HOST_COUNTS})
    shares = np.empty((len(SEEDS), len(capacities)))
    for i, seed in enumerate(SEEDS):
        far = distances(stream(chances, np.random.default_rng([seed, round(10 * exponent)])))[ADAPTERS:]
        shares[i] = [(far <= capacity).mean() for capacity in capacities]
    errors = shares.std(axis=0, ddof=1) / len(SEEDS) ** 0.5
    rows = []
    for capacity, share, error in zip(capacities, shares.mean(axis=0), errors, strict=True):
        expected = che(chances, capacity)
        assert abs(share - expected) <= 4 * error + 5e-4, (exponent, capacity, share, expected, error)
        row = {"exponent": exponent, "adapters_held": capacity, "hit_rate": round(float(share), 5)}
        rows.append(row | {"se": round(float(error), 6), "che": round(expected, 5)})
    return rows


def load_times(bases: Mapping[str, Model], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds from disk and from cache: measured, and the 100M model's scaled by bytes and by modules."""
    times: dict[str, Any] = {}
    for name, model in bases.items():
        times[name] = {}
        for method in (m for m in METHODS if m.name in TIMED):
            known = {key: measured["100M"]["load"][method.name][key] for key in ("from_disk_ms", "from_cache_ms")}
            row: dict[str, Any] = {"measured": None}
            if name in measured:
                row["measured"] = {key: measured[name]["load"][method.name][key] for key in known}
            for how, ratio in (
                ("scaled_by_bytes", host_bytes(model, method) / host_bytes(bases["100M"], method)),
                ("scaled_by_modules", len(model.modules) / len(bases["100M"].modules)),
            ):
                row[how] = {"times": round(ratio, 4), **{key: round(ms * ratio, 2) for key, ms in known.items()}}
            times[name][method.name] = row
    return times


def added_times(rates: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mean milliseconds of loading per request, for every pair of cache sizes; the 100M model's scale is 1."""
    share = {(row["exponent"], row["adapters_held"]): row["hit_rate"] for row in rates}
    rows: list[dict[str, Any]] = []
    for exponent, slots, host in itertools.product(EXPONENTS, SLOT_COUNTS, HOST_COUNTS):
        in_slot, on_host = share[exponent, slots], share[exponent, host]
        row = {"exponent": exponent, "max_loras": slots, "host": host, "slot_hits": in_slot}
        row |= {"host_hits": round(on_host - in_slot, 5), "misses": round(1 - on_host, 5)}
        added: dict[str, dict[str, float]] = {}
        for name in (name for name in times if name != "embedded"):
            one = {kind: row["scaled_by_bytes"] for kind, row in times[name].items()}
            added["100M, measured" if name == "100M" else f"{name}, scaled by bytes"] = {
                kind: round((on_host - in_slot) * ms["from_cache_ms"] + (1 - on_host) * ms["from_disk_ms"], 3)
                for kind, ms in one.items()
            }
        rows.append({**row, "added_ms": added})
    return rows


def vllm_managers(slots: int, host: int) -> Any:
    """vLLM's own managers of both caches, over a model without layers; reading a file makes an empty adapter."""
    inner = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    inner.lora_config = SimpleNamespace(max_loras=slots, max_cpu_loras=host)
    inner._registered_adapters = AdapterLRUCache(host, inner.deactivate_adapter)
    inner._active_adapters = AdapterLRUCache(slots, inner._deactivate_adapter)
    inner.lora_index_to_id = [None] * slots
    inner.modules, inner.packed_modules = {}, {}
    inner._enable_mixed_moe_lora_format = inner.is_pooling_model = False
    outer = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    outer._adapter_manager = inner
    nothing = torch.empty(0)
    outer._load_adapter = lambda request: LoRAModel(
        request.lora_int_id, 1, {"none": LoRALayerWeights("none", 1, 1, nothing, nothing)}
    )
    return outer


def check_managers(slots: int, host: int, requests: int) -> None:
    """Every request's outcome in vLLM's managers, and in the plugin's engine, is what its distance says."""
    uses = draw(popularity(0.8), requests, np.random.default_rng(0))
    padded = np.concatenate([uses, np.full(-requests % (1 << 13), uses[-1])])
    assert len(padded) == 1 << 13
    outer, kept = vllm_managers(slots, host), EngineAdapters(limit=host)
    inner = outer._adapter_manager
    for use, far in zip(uses.tolist(), distances(padded).tolist(), strict=False):
        number = use + 1
        found = (number in inner._active_adapters, number in inner._registered_adapters, number in kept.nbytes)
        assert found == (far <= slots, far <= host, far <= host), (number, far, found)
        outer.add_adapter(SimpleNamespace(lora_int_id=number, load_inplace=False))
        for other in [] if found[2] else kept.to_drop(1, {number}):
            del kept.nbytes[other]
        kept.nbytes[number] = 1
        kept.nbytes.move_to_end(number)


def bookkeeping_ms(host: int) -> float:
    """Time of add_adapter for an adapter that is in a slot, with so many on the host; the best of some."""
    outer = vllm_managers(8, host)
    for number in range(1, host + 1):
        model = outer._load_adapter(SimpleNamespace(lora_int_id=number))
        outer._adapter_manager.add_adapter(model)
    request = SimpleNamespace(lora_int_id=host, load_inplace=False)
    outer.add_adapter(request)
    taken = []
    for _ in range(25):
        start = time.process_time()
        outer.add_adapter(request)
        taken.append((time.process_time() - start) * 1e3)
    return round(min(taken), 4)


# --- waiting ---------------------------------------------------------------------------------------------------------


def burst(chances: Floats, requests: int, rng: np.random.Generator) -> Ints:
    """For each of some requests at once: how many distinct adapters are asked for before its own is first."""
    _, first, which = np.unique(draw(chances, requests, rng), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[which]


class ClosedSystem(NamedTuple):
    """What a closed system did after its start."""

    waited: float  # share of requests
    wait: float  # mean, of all requests
    running: float  # mean number
    rate: float  # requests per time


def closed(chances: Floats, slots: int, users: int, rng: np.random.Generator) -> ClosedSystem:
    """A closed system: exponential lengths of mean 1; the scheduler's rule decides who starts."""
    total = WARM_UP + COMPLETIONS
    asked = iter(draw(chances, users + total, rng).tolist())
    lengths = iter(rng.exponential(size=users + total).tolist())
    ends: list[tuple[float, int]] = []  # of the running requests, with their adapters
    in_batch: dict[int, int] = {}
    waiting: dict[int, list[float]] = {}  # arrivals by adapter; those of one adapter start together
    now = begin = area = wait = 0.0
    waited = 0

    def start(adapter: int) -> None:
        in_batch[adapter] = in_batch.get(adapter, 0) + 1
        heapq.heappush(ends, (now + next(lengths), adapter))

    def arrive(adapter: int) -> bool:
        if adapter in in_batch or (len(in_batch) < slots and not waiting):
            start(adapter)
            return False
        waiting.setdefault(adapter, []).append(now)
        return True

    for _ in range(users):
        arrive(next(asked))
    for done in range(total):
        if done == WARM_UP:
            begin, area, wait, waited = now, 0.0, 0.0, 0
        end, adapter = heapq.heappop(ends)
        area += (end - now) * (len(ends) + 1)
        now = end
        in_batch[adapter] -= 1
        if not in_batch[adapter]:
            del in_batch[adapter]
        while waiting and len(in_batch) < slots:
            oldest = next(iter(waiting))
            for arrival in waiting.pop(oldest):
                wait += now - arrival
                start(oldest)
        waited += arrive(next(asked))
    span = now - begin
    return ClosedSystem(waited / COMPLETIONS, wait / COMPLETIONS, area / span, COMPLETIONS / span)


def waiting_rows(exponent: float) -> Iterator[dict[str, Any]]:
    """Bursts and closed systems of every size."""
    chances = popularity(exponent)
    for requests in CONCURRENT:
        rng = np.random.default_rng([requests, round(10 * exponent)])
        ranks = np.stack([burst(chances, requests, rng) for _ in range(len(SEEDS) * BURSTS)])
        distinct, expected = ranks.max(axis=1) + 1, (1 - (1 - chances) ** requests).sum()
        error = distinct.std(ddof=1) / len(distinct) ** 0.5
        assert abs(distinct.mean() - expected) <= 4 * error, (exponent, requests)
        for slots in SLOT_COUNTS:
            row: dict[str, Any] = {"exponent": exponent, "concurrent": requests, "max_loras": slots}
            row["burst"] = {"distinct": _mean(distinct), "waited": _mean((ranks >= slots).mean(axis=1))}
            if slots >= requests:  # there is a slot for everybody
                runs = [ClosedSystem(0.0, 0.0, float(requests), float(requests)) for _ in SEEDS]
            else:
                generators = [np.random.default_rng([seed, slots, requests]) for seed in SEEDS]
                runs = [closed(chances, slots, requests, rng) for rng in generators]
            row["closed"] = {key: _mean([getattr(run, key) for run in runs]) for key in ("waited", "wait", "running")}
            little = float(np.mean([(requests - run.running) / run.rate for run in runs]))
            assert abs(row["closed"]["wait"]["mean"] - little) <= 0.02 * little + 1e-3, (row, little)
            yield row


def _mean(values: Sequence[float] | Floats) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    return {"mean": round(float(array.mean()), 5), "se": round(float(array.std(ddof=1) / len(array) ** 0.5), 6)}
