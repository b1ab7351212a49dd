"""A worker's part of loading an adapter, called by the engine: read it, activate it, or roll back.

vLLM lets each worker read an adapter's files on its own, at a load and again in the middle of a step when the adapter
was evicted meanwhile: one that fails there ends the engine, and one that fails on some workers only leaves them apart.
Here the engine loads in two steps (`soka_vllm.engine`): every worker reads and checks, and only if all could does each
take the adapter over. What was taken over stays in the worker's memory until the engine drops it, so that a step reads
no files.

The functions are sent to the workers by name; each takes vLLM's worker first and returns plain values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import torch
import xxhash
from torch import Tensor

from soka_serve.errors import printable

_logger = logging.getLogger("vllm.soka")

# Of a LoRAModel: what `read` answers, where its reader knows that.
READ_RESULT = "soka_read_result"
_LONGEST_REASON = 4000  # characters of why an adapter is refused
# On the LoRAModel of a sum: LoRA's matrices for layers that hold Kronecker factors of it too, by module.
BESIDE = "soka_beside"


class ReadResult(NamedTuple):
    """A worker's answer to `read`."""

    refusal: str = ""  # empty where it can be taken over
    fingerprint: str = ""  # of all values
    nbytes: int = 0


@dataclass
class WorkerAdapters:
    """A worker's adapters in use by integer id, and the one that is being loaded."""

    adapters: dict[int, tuple[Any, ReadResult]] = field(default_factory=dict)
    read: tuple[Any, ReadResult] | None = None
    former: tuple[Any, ReadResult] | None = None  # what `read` has replaced
    taken: bool = False  # whether the last `take` took over what was read

    def model(self, number: int) -> Any:
        """The LoRAModel of an id, or None."""
        return self.adapters[number][0] if number in self.adapters else None

    def fingerprint(self, number: int) -> str:
        """Of what was read of an adapter in use."""
        return self.adapters[number][1].fingerprint


def worker_adapters(manager: Any) -> WorkerAdapters:
    """The `WorkerAdapters` of a WorkerLoRAManager, made at the first call."""
    kept = manager.__dict__.setdefault("_soka_kept", WorkerAdapters())
    assert isinstance(kept, WorkerAdapters)
    return kept


def loaded_already(lora_request: Any) -> Any:
    """The request with `load_inplace` cleared: vLLM stores the request and would reload the adapter at every step."""
    return msgspec.structs.replace(lora_request, load_inplace=False) if lora_request.load_inplace else lora_request


def limits(worker: Any) -> list[int]:
    """What reading an adapter of the served model may take, see `soka_vllm.limits`, as plain numbers."""
    from soka_vllm.reading import limits_of

    return list(limits_of(worker.model_runner.lora_manager))


def read(worker: Any, lora_request: Any, anew: bool) -> ReadResult:
    """First step of a load: read and check the adapter's files, changing nothing that is served.

    Args:
        worker: vLLM's.
        lora_request: vLLM's, of the adapter.
        anew: read the files even if the adapter is in memory.
    """
    manager, number = worker.model_runner.lora_manager, lora_request.lora_int_id
    kept = worker_adapters(manager)
    kept.read = kept.former = None
    if not anew and number in kept.adapters:
        return kept.adapters[number][1]
    try:
        model = manager._load_adapter(msgspec.structs.replace(lora_request, load_inplace=True))
        kept.read = model, _reading(model)
    except Exception as error:
        _logger.debug("Adapter %r cannot be read", lora_request.lora_name, exc_info=True)
        return ReadResult(refusal=printable(error, _LONGEST_REASON, keep="\n") or type(error).__name__)
    return kept.read[1]


def take(worker: Any, lora_request: Any, activate: bool, drop: Sequence[int]) -> str:
    """Second step: serve what was read; returns why not, empty where it went well.

    Args:
        worker: vLLM's.
        lora_request: vLLM's, of the adapter.
        activate: put it into a slot at once, as vLLM does at a load.
        drop: ids of adapters to forget.
    """
    manager, number = worker.model_runner.lora_manager, lora_request.lora_int_id
    kept = worker_adapters(manager)
    forget(worker, drop)
    kept.taken = kept.read is not None
    if kept.read is not None:
        kept.former = kept.adapters.get(number)
        kept.adapters[number], kept.read = kept.read, None
        manager.remove_adapter(number)  # its slot holds what it was before
    try:
        if activate:
            manager.add_adapter(loaded_already(lora_request))
    except Exception as error:
        _logger.exception("Adapter %r cannot be put into a slot", lora_request.lora_name)
        return printable(error, _LONGEST_REASON, keep="\n") or type(error).__name__
    return ""


def undo(worker: Any, lora_request: Any) -> None:
    """After a `take` that did not go well everywhere: go back to what the adapter was before, if it was anything."""
    manager, number = worker.model_runner.lora_manager, lora_request.lora_int_id
    kept = worker_adapters(manager)
    manager.remove_adapter(number)
    if kept.taken:
        kept.adapters.pop(number, None)
    if kept.former is not None:
        kept.adapters[number], kept.former = kept.former, None


def forget(worker: Any, numbers: Sequence[int]) -> None:
    """Forget adapters that are kept in memory; what is in slots stays there."""
    for number in numbers:
        worker_adapters(worker.model_runner.lora_manager).adapters.pop(number, None)


def _reading(model: Any) -> ReadResult:
    known = getattr(model, READ_RESULT, None)
    if isinstance(known, ReadResult):
        return known
    nbytes, digest = 0, xxhash.xxh3_128()
    for name, tensor in tensors_of(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
        nbytes += tensor.nbytes
    return ReadResult(fingerprint=digest.hexdigest(), nbytes=nbytes)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values in row-major order. A dimension of one may have any stride, which `view` would refuse."""
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data  # type: ignore[no-any-return, unused-ignore]


def whole_modules(model: Any) -> Mapping[str, Any]:
    """The modules that a LoRAModel replaces, by name; vLLM before 0.31 knows none."""
    found: Mapping[str, Any] | None = getattr(model, "modules_to_save", None)
    return found or {}


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a LoRAModel, with their scaling in the name, in an order of their own.

    Not every rank of a pipeline may know where a name of LyCORIS has its dots, so they do not count.
    """
    for held in (model.loras, getattr(model, BESIDE, {})):
        parts: Mapping[str, Any] = {name.replace(".", "_"): part for name, part in held.items()}
        for name in sorted(parts):
            for values in (parts[name].lora_a, parts[name].lora_b):
                for tensor in values if isinstance(values, Iterable) and not isinstance(values, Tensor) else [values]:
                    if tensor is not None:
                        yield f"{name} {parts[name].scaling}", tensor
    for name, saved in sorted(whole_modules(model).items()):
        yield from ((name, tensor) for tensor in (saved.weight, saved.bias) if tensor is not None)
