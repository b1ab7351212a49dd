"""Where the plugin enters vLLM: three names are rebound, once per process."""

from __future__ import annotations

import functools
import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

from soka_vllm import compat
from soka_vllm.layers import kronecker_class
from soka_vllm.loader import READERS, load_adapter, read_peft_type

_logger = logging.getLogger("vllm.soka")
_MARK = "_soka_installed"


def install() -> None:
    """Rebind vLLM's layer classes, adapter loading and the answer to a refused load; see `soka_vllm.register`."""
    if getattr(compat.lora_utils, _MARK, False):
        return
    compat.check_vllm()
    if compat.on_cpu():
        compat.lora_utils._all_lora_classes = tuple(
            kronecker_class(cls) if cls in compat.LORA_LAYERS else cls for cls in compat.lora_utils._all_lora_classes
        )
    _wrap_load_adapter()
    _wrap_refusals()
    _wrap_load_model()
    setattr(compat.lora_utils, _MARK, True)


def _wrap_load_adapter() -> None:
    """Kronecker adapters are ours to load, LoRA and what has no readable config vLLM's."""
    stock = compat.WorkerLoRAManager._load_adapter

    @functools.wraps(stock)
    def load(self: Any, lora_request: Any) -> Any:
        directory = compat.get_adapter_absolute_path(lora_request.lora_path)
        kind = read_peft_type(directory)
        if kind in (None, "LORA"):
            return stock(self, lora_request)
        if kind not in READERS:
            raise ValueError(f"{directory}: peft_type is {kind!r}; supported are LORA, {', '.join(READERS)}")
        if not compat.on_cpu():
            raise ValueError(f"{directory}: this version of the plugin runs Kronecker adapters on CPUs only")
        return load_adapter(Path(directory), kind, lora_request, self._adapter_manager, self.lora_config.lora_dtype)

    compat.WorkerLoRAManager._load_adapter = load


def _wrap_refusals() -> None:
    """A refused adapter is the caller's mistake (400), not the server's (500), while the engine lives."""
    stock = compat.OpenAIServingModels.load_lora_adapter

    @functools.wraps(stock)
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        answer = await stock(self, request, base_model_name)
        if (
            isinstance(answer, compat.ErrorResponse)
            and answer.error.code == HTTPStatus.INTERNAL_SERVER_ERROR
            and not self.engine_client.errored
        ):
            _logger.warning("Refused adapter %r: %s", request.lora_name, answer.error.message)
            answer.error.code = HTTPStatus.BAD_REQUEST.value
            answer.error.type = "BadRequestError"
        return answer

    compat.OpenAIServingModels.load_lora_adapter = load


def _wrap_load_model() -> None:
    """On CPUs, see `compat.make_pipeline_buffers`."""
    stock = compat.CPUModelRunner.load_model

    @functools.wraps(stock)
    def load_model(self: Any, load_dummy_weights: bool = False) -> None:
        stock(self, load_dummy_weights)
        compat.make_pipeline_buffers(self)

    compat.CPUModelRunner.load_model = load_model
