"""The names of vLLM that the plugin rebinds: one table, one row a name.

vLLM runs as several processes: one for the API, one for the engine, its workers, and short ones that look at a model's
class. Each imports a part of vLLM, and the plugin nothing more of it: a row is applied when vLLM imports the row's
module, or at once where it has. Rows of one module are applied in the order of the table. No name has two rows.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from soka_serve.errors import printable
from soka_vllm.checks import ATTRIBUTES, CALLED, Signature, check_modules, check_version, vllm_version
from soka_vllm.settings import (
    BUILDS_VARIABLE,
    has_metrics_folder,
    keep_limit,
    serves_lora,
    slot_values,
    sums_limit,
    sums_salt,
    turn_seconds,
)
from soka_vllm.versions import is_before

_logger = logging.getLogger("vllm.soka")
_LONGEST_MESSAGE = 4000  # of the plugin's in the log, characters


@dataclass(frozen=True)
class Hook:
    """One name that is rebound.

    Args:
        module: of vLLM, or of what vLLM leaves its endpoint of metrics to.
        name: function, Class.method or value in it.
        parameters: names of the parameters that vLLM's function must have; None: any, and of a value.
        replacement: "module:function" of the plugin. It is called with what vLLM has under the name (None for a name
            of the plugin's own) and then with what the name is called with. Of a value it returns the new one.
        why: what for.
        since: the first release that has the name, None: the first that is supported.
        until: the first release that needs no such row. There and later the name may be gone; before, it must be there.
    """

    module: str
    name: str
    parameters: str | None
    replacement: str
    why: str
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None

    @property
    def is_own(self) -> bool:
        """Whether the name is the plugin's: vLLM has none there."""
        return self.name.rpartition(".")[2].startswith("soka_")


_SERVING = "vllm.entrypoints.openai.models.serving"
_OUTPUT = "vllm.v1.engine.output_processor"
_ENGINE = "vllm.v1.engine.core"
_WORKER = "vllm.lora.worker_manager"

HOOKS = (
    # In every process.
    Hook(
        *("vllm.lora.request", "LoRARequest.__eq__", None, "soka_vllm.places:are_equal"),
        "An adapter that is loaded again under its name gets another id; to vLLM both are one.",
    ),
    Hook(
        *("vllm.envs", "compile_factors", "", "soka_vllm.settings:compile_factors"),
        "A compiled graph in vLLM's cache is taken by servers alone that have the same of the plugin in it.",
    ),
    # In the API process.
    Hook(
        *("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", "self lora_request", "soka_vllm.admission:add_lora"),
        "Adapters are checked before the engine is called; loads are counted.",
    ),
    Hook(
        *(_SERVING, "OpenAIServingModels.__init__", None, "soka_vllm.endpoints:make_models"),
        "Locks that nobody holds are dropped: vLLM keeps one for every name that it was ever asked for.",
    ),
    Hook(
        *(_SERVING, "OpenAIServingModels.init_static_loras", "self", "soka_vllm.endpoints:load_static"),
        "Adapters that the server is started with are the operator's, and may lie anywhere.",
    ),
    Hook(
        *(_SERVING, "OpenAIServingModels.resolve_lora", "self lora_name", "soka_vllm.endpoints:resolve"),
        "The answer says why an adapter could not be loaded; names that no adapter can have reach no resolver.",
    ),
    Hook(
        *("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model", "self request"),
        "soka_vllm.endpoints:check_model",
        "A model's name may be a sum of adapters; the answer about one that does not exist says which do.",
    ),
    Hook(
        *("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._check_model", "self request"),
        "soka_vllm.endpoints:check_pooling_model",
        "Servers of pooling models have a check of their own, which takes any name.",
    ),
    Hook(
        *("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters"),
        *("self request supports_default_mm_loras", "soka_vllm.endpoints:get_adapters"),
        "The adapter of a request may be a sum.",
    ),
    Hook(
        *(_SERVING, "OpenAIServingModels.load_lora_adapter", "self request base_model_name"),
        "soka_vllm.endpoints:load",
        "Runtime loads are held to the allowed folders; a refused adapter is the caller's mistake (400).",
    ),
    Hook(
        *(_SERVING, "OpenAIServingModels.unload_lora_adapter", "self request", "soka_vllm.endpoints:unload"),
        "The metrics of an adapter end with it.",
    ),
    Hook(
        *(_OUTPUT, "OutputProcessor._update_stats_from_output"),
        "self req_state engine_core_output engine_core_timestamp iteration_stats",
        "soka_vllm.metrics:count_tokens",
        "Tokens are counted by adapter.",
    ),
    Hook(
        *(_OUTPUT, "OutputProcessor._update_stats_from_finished", "self req_state finish_reason iteration_stats"),
        "soka_vllm.metrics:count_finished",
        "Requests are counted by adapter and reason.",
    ),
    Hook(
        *(_OUTPUT, "OutputProcessor.abort_requests", "self request_ids internal", "soka_vllm.metrics:count_aborted"),
        "Aborted requests are counted too.",
    ),
    Hook(
        *("prometheus_client.multiprocess", "MultiProcessCollector.collect", None, "soka_vllm.metrics:collect"),
        "The endpoint of each of several API processes shows the slots too.",
    ),
    # In the engine.
    Hook(
        *(_ENGINE, "EngineCore.soka_limits", None, "soka_vllm.engine:reading_limits"),
        "The API process asks by this name what an adapter of the served model may take to read.",
    ),
    Hook(
        *(_ENGINE, "EngineCore.add_lora", "self lora_request", "soka_vllm.engine:add_lora"),
        "Adapters are loaded by all workers or none.",
    ),
    Hook(
        *(_ENGINE, "EngineCore.remove_lora", "self lora_id", "soka_vllm.engine:remove_lora"),
        "What was removed is forgotten: its id may be another adapter's next.",
    ),
    Hook(
        *(_ENGINE, "EngineCore.add_request", "self request request_wave", "soka_vllm.engine:add_request"),
        "A request's adapter is in memory before the request is in a step.",
    ),
    Hook(
        *("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "self throttle_prefills", "soka_vllm.turns:schedule"),
        "Requests past --max-loras get their turn, whatever others ask for.",
    ),
    Hook(
        *("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", "request", "soka_vllm.engine:prefix_keys"),
        "The prefix cache tells new weights under a known name from the old ones.",
    ),
    # In the workers.
    Hook(
        *("vllm.lora.utils", "_all_lora_classes", None, "soka_vllm.layers:kronecker_classes"),
        "Layers hold Kronecker factors in some slots and LoRA's matrices in others.",
    ),
    Hook(
        *(_WORKER, "WorkerLoRAManager._load_adapter", "self lora_request", "soka_vllm.reading:load"),
        "Kronecker adapters are read by the plugin, LoRA's by vLLM, those in memory not at all.",
    ),
    Hook(
        *("vllm.lora.lora_model", "safetensors", None, "soka_vllm.stock:without_mapping"),
        "A LoRA's file is read and not mapped: one that is cut ended the process, one that is overwritten was served.",
    ),
    Hook(
        *(_WORKER, "LRUCacheWorkerLoRAManager._apply_adapters", "self lora_requests"),
        "soka_vllm.worker:apply_adapters",
        "A reload in place was repeated at every later step (vLLM up to 0.32).",
    ),
    Hook(
        *(_WORKER, "LRUCacheWorkerLoRAManager.create_lora_manager", "self model vllm_config"),
        "soka_vllm.metrics:note_engine",
        "The metrics tell the workers of data-parallel engines apart.",
    ),
    Hook(
        *(_WORKER, "LRUCacheWorkerLoRAManager.add_adapter", "self lora_request", "soka_vllm.metrics:note_slots"),
        "The metrics show which adapters are in slots.",
    ),
    Hook(
        *("vllm.lora.model_manager", "LoRAModelManager.activate_adapter", "self lora_id", "soka_vllm.worker:activate"),
        "A slot is emptied in all layers before it is filled in the first, and where filling it fails.",
    ),
    Hook(
        *("vllm.lora.peft_helper", "PEFTHelper._match_pattern", None, "soka_serve.adapter.patterns:match_for_vllm"),
        "Patterns of adapters are matched in linear time.",
        since=(0, 32),
    ),
    Hook(
        *("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata", None),
        "soka_vllm.worker:note_adapters",
        "On a CPU, a step without adapters costs nothing.",
    ),
    Hook(
        *("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "self load_dummy_weights"),
        "soka_vllm.worker:load_model",
        "The buffers of a later stage of a pipeline are there before its first request; later runners make them.",
        until=(0, 34),
    ),
)


@functools.cache
def rows(version: str) -> tuple[Hook, ...]:
    """The table's rows for a version of vLLM."""
    return tuple(
        hook
        for hook in HOOKS
        if (hook.since is None or not is_before(version, hook.since))
        and (hook.until is None or is_before(version, hook.until))
    )


@functools.cache
def signatures(version: str) -> tuple[Signature, ...]:
    """The functions and values that a version of vLLM must have."""
    needed = (hook for hook in rows(version) if not hook.is_own)
    return (*CALLED, *(Signature(hook.module, hook.name, hook.parameters) for hook in needed))


@functools.cache
def modules(version: str) -> frozenset[str]:
    """The modules of a version of vLLM that the plugin looks at."""
    called = {signature.module for signature in signatures(version)}
    return frozenset(called | {hook.module for hook in rows(version)} | ATTRIBUTES.keys())


def install() -> None:
    """Apply the table's rows, now or when vLLM imports their modules; see `soka_vllm.register`.

    Raises:
        RuntimeError: vLLM is not supported; nothing was changed.
        ValueError: an environment variable of the plugin has a wrong value.
    """
    if _finder in sys.meta_path:
        return
    version = vllm_version()
    check_version(signatures(version))
    serves_lora()
    keep_limit()
    sums_limit()
    sums_salt()
    turn_seconds()
    slot_values()
    imported = [name for name in sorted(modules(version)) if name in sys.modules]
    check_modules(imported, signatures(version))
    if BUILDS_VARIABLE in os.environ:
        from soka_vllm import resolver

        resolver.register()
    if not has_metrics_folder():
        from soka_vllm import metrics

        metrics.make_folder()
    _rebind(imported)
    _finder.names = modules(version)
    sys.meta_path.insert(0, _finder)
    _logger.addFilter(_one_line)


def check_vllm() -> None:
    """Import all of vLLM that the plugin uses, and check it: RuntimeError where it is not supported."""
    from vllm.platforms import current_platform

    version = vllm_version()
    check_version(signatures(version))
    names = [name for name in modules(version) if current_platform.is_cpu() or "cpu" not in name]
    for name in names:
        importlib.import_module(name)
    check_modules(names, signatures(version))


def _one_line(record: logging.LogRecord) -> bool:
    """Make log messages one line: they can contain names, paths and contents of files that others made."""
    record.msg, record.args = printable(record.getMessage(), _LONGEST_MESSAGE), None
    return True


def _rebind(names: Sequence[str]) -> None:
    """Apply the rows of imported modules."""
    for hook in rows(vllm_version()):
        if hook.module in names:
            *path, name = hook.name.split(".")
            owner: Any = functools.reduce(getattr, path, sys.modules[hook.module])
            stock = getattr(owner, name, None)
            place, _, function = hook.replacement.partition(":")
            replacement = getattr(importlib.import_module(place), function)
            static = isinstance(inspect.getattr_static(owner, name, None), staticmethod)
            bound = _bind(replacement, stock)
            setattr(owner, name, staticmethod(bound) if static else bound)


def _bind(replacement: Callable[..., Any], stock: Any) -> Any:
    """What takes the place of `stock`: see `Hook.replacement`."""
    if stock is not None and not callable(stock):
        return replacement(stock)

    @functools.wraps(replacement if stock is None else stock)
    def call(*arguments: Any, **options: Any) -> Any:
        return replacement(stock, *arguments, **options)

    return call


class _Finder:
    """Entry of `sys.meta_path`: finds the table's modules as the other entries do, and applies their rows."""

    names: frozenset[str] = frozenset()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python's import system calls this; None leaves a module to the other entries."""
        if name not in self.names:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_rebind(module: ModuleType) -> None:
            execute(module)
            check_modules([name], signatures(vllm_version()))
            _rebind([name])

        spec.loader.exec_module = execute_and_rebind  # type: ignore[method-assign]
        return spec


_finder = _Finder()
