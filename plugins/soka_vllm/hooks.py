"""Where the plugin enters vLLM: some names are rebound, once per process."""

from __future__ import annotations

import asyncio
import functools
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec

from soka_serve.errors import printable
from soka_vllm import admission, compat, engine, metrics, patterns, resolver
from soka_vllm.kept import kept_by, loaded_already
from soka_vllm.layers import ADAPTERS_IN_STEP, LORA_VARIABLE, KroneckerMixin, kronecker_class, serves_lora
from soka_vllm.loader import LORA, READERS, check_lora, load_adapter, look_at

_logger = logging.getLogger("vllm.soka")
_MARK = "_soka_installed"
_LONGEST_MESSAGE = 4000  # of the plugin's in the log, characters


def install() -> None:
    """Rebind vLLM's layer classes, the loading of adapters, and what follows from it; see `soka_vllm.register`."""
    if getattr(compat.lora_utils, _MARK, False):
        return
    compat.check_vllm()
    serves_lora()  # a wrong setting is told at start-up
    if compat.has_operator():
        compat.lora_utils._all_lora_classes = tuple(
            kronecker_class(cls) if cls in compat.LORA_LAYERS else cls for cls in compat.lora_utils._all_lora_classes
        )
        if not compat.on_cpu():
            _logger.warning("Kronecker adapters have been tested in whole servers on CPUs only, not on a GPU")
    _wrap_load_adapter()
    _wrap_requests()
    _wrap_slots()
    _wrap_mapping()
    _wrap_engine()
    _wrap_refusals()
    if compat.on_cpu():
        _wrap_load_model()
    resolver.install()
    metrics.install()
    _logger.addFilter(_one_line)
    setattr(compat.lora_utils, _MARK, True)


def _one_line(record: logging.LogRecord) -> bool:
    """Make log messages one line: they can contain names, paths and contents of files that others made."""
    record.msg, record.args = printable(record.getMessage(), _LONGEST_MESSAGE), None
    return True


def _wrap_load_adapter() -> None:
    """Read Kronecker adapters with the plugin, everything else with vLLM's reader, and cached adapters not at all."""
    stock = compat.WorkerLoRAManager._load_adapter

    def read_files(self: Any, directory: Path, lora_request: Any) -> Any:
        kind, budget = admission.limits_of(self).open(directory)
        if kind == LORA and not serves_lora():
            raise ValueError(f"an ordinary LoRA adapter; this server was started with {LORA_VARIABLE}=0")
        if kind in (None, LORA):
            with patterns.matching(look_at(directory, kind, budget)):
                model = stock(self, msgspec.structs.replace(lora_request, lora_path=str(directory)))
            check_lora(model, self._adapter_manager)
            return model
        if not compat.has_operator():
            raise ValueError("Kronecker adapters run on CPUs and on NVIDIA's and AMD's GPUs; this is neither")
        if kind not in READERS:
            raise ValueError(f"peft_type is {kind!r}; supported are LORA, {', '.join(READERS)}")
        return load_adapter(directory, kind, lora_request, self._adapter_manager, self.lora_config.lora_dtype, budget)

    def read(self: Any, lora_request: Any) -> Any:
        with resolver.adapter_files(lora_request) as files:
            return read_files(self, files, lora_request)

    @functools.wraps(stock)
    def load(self: Any, lora_request: Any) -> Any:
        model = None if lora_request.load_inplace else kept_by(self).model(lora_request.lora_int_id)
        return self.read_adapter(lora_request) if model is None else model

    compat.WorkerLoRAManager.read_adapter = read
    compat.WorkerLoRAManager._load_adapter = load
    if hasattr(compat.PEFTHelper, "_match_pattern"):  # earlier versions know no patterns
        compat.PEFTHelper._match_pattern = staticmethod(patterns.match_for_vllm)


def _wrap_requests() -> None:
    """Tell adapters of one name apart. To vLLM they are equal, and a step collects those of its requests in a set.

    An adapter that is unloaded and loaded again gets another id. With a request of before still running, a step had
    both ids and activated one: the engine ended with a KeyError (up to 0.32, LoRA too).
    """
    stock = compat.LoRARequest.__eq__

    def equal(self: Any, other: object) -> bool:
        return bool(stock(self, other)) and self.lora_int_id == getattr(other, "lora_int_id", None)

    compat.LoRARequest.__eq__ = equal


def _wrap_slots() -> None:
    """Empty a slot in all layers before it is filled in the first; and mend two things of vLLM up to 0.32.

    A reload in place was repeated at every later step, and an adapter that could not be put into its slot was served
    half set from then on.
    """
    stock_apply = compat.LRUCacheWorkerLoRAManager._apply_adapters
    stock_activate = compat.LoRAModelManager.activate_adapter

    @functools.wraps(stock_apply)
    def apply_adapters(self: Any, lora_requests: Any) -> None:
        stock_apply(self, {loaded_already(lora_request) for lora_request in lora_requests if lora_request})

    @functools.wraps(stock_activate)
    def activate(self: Any, lora_id: int) -> bool:
        if lora_id not in self._active_adapters and None in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(None)  # vLLM takes the first
            for layer in self.modules.values():
                if isinstance(layer, KroneckerMixin):
                    layer.reset_lora(slot)
        try:
            return bool(stock_activate(self, lora_id))
        except Exception:
            self.deactivate_adapter(lora_id)
            raise

    compat.LRUCacheWorkerLoRAManager._apply_adapters = apply_adapters
    compat.LoRAModelManager.activate_adapter = activate


def _wrap_mapping() -> None:
    """Note of each step whether any token belongs to an adapter; on a CPU, layers then leave adapters out."""
    stock = compat.PunicaWrapperBase.update_metadata

    @functools.wraps(stock)
    def update_metadata(self: Any, mapping: Any, *more: Any, **options: Any) -> None:
        stock(self, mapping, *more, **options)
        setattr(self, ADAPTERS_IN_STEP, any(mapping.index_mapping))

    compat.PunicaWrapperBase.update_metadata = update_metadata


def _wrap_engine() -> None:
    """Adapters are loaded by all workers or none, before a step; see `soka_vllm.engine`."""
    engine.keep_limit()  # a wrong setting is told at start-up
    compat.EngineCore.soka_limits = admission.of_engine
    compat.EngineCore.add_lora = functools.wraps(compat.EngineCore.add_lora)(engine.add_lora)
    stock = compat.EngineCore.add_request

    @functools.wraps(stock)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> None:
        engine.add_request(stock, self, request, request_wave)

    compat.EngineCore.add_request = add_request
    stock_front = compat.AsyncLLM.add_lora

    @functools.wraps(stock_front)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        limited = resolver.limits_of(lora_request)
        await admission.check(self, limited)
        # Reading a base of many GB takes a while; the engine, which asks again, then finds the answer.
        await asyncio.to_thread(engine.check_served_base, limited, self.vllm_config.model_config)
        return bool(await stock_front(self, limited))

    compat.AsyncLLM.add_lora = add_lora
    compat.kv_cache_utils._gen_lora_extra_hash_keys = engine.prefix_keys


def _wrap_refusals() -> None:
    """A refused adapter is the caller's mistake (400), not the server's (500), while the engine lives."""
    stock = compat.OpenAIServingModels.load_lora_adapter

    @functools.wraps(stock)
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from_command_line = [module.path for module in self.static_lora_modules or ()]
        if ".." in Path(request.lora_path).parts and request.lora_path not in from_command_line:
            message = f"{request.lora_name}: '..' in the path of an adapter; give the folder itself"
            return compat.ErrorResponse(error={"message": message, "type": "BadRequestError", "code": 400})
        answer = await stock(self, request, base_model_name)
        if (
            isinstance(answer, compat.ErrorResponse)
            and answer.error.code == HTTPStatus.INTERNAL_SERVER_ERROR
            and not self.engine_client.errored
        ):
            _logger.warning(
                "Refused adapter %r from %s: %s", request.lora_name, request.lora_path, answer.error.message
            )
            answer.error.code = HTTPStatus.BAD_REQUEST.value
            answer.error.type = "BadRequestError"
        return answer

    compat.OpenAIServingModels.load_lora_adapter = load


def _wrap_load_model() -> None:
    """See `compat.make_pipeline_buffers`."""
    stock = compat.CPUModelRunner.load_model

    @functools.wraps(stock)
    def load_model(self: Any, load_dummy_weights: bool = False) -> None:
        stock(self, load_dummy_weights)
        compat.make_pipeline_buffers(self)

    compat.CPUModelRunner.load_model = load_model
