"""Adapters by name from a folder of builds, at the first request; and which folders adapters may be loaded from.

Both are set by the environment:

- SOKA_BUILDS=FOLDER: a request for a model NAME that is not served yet loads FOLDER/NAME/adapter, or FOLDER/NAME where
  the adapter is there itself. vLLM asks its resolvers with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 only. SoKA, LoKr and LoRA
  alike; vLLM's own filesystem resolver knows LoRA only.
- SOKA_ADAPTER_ROOTS=FOLDER[:FOLDER...]: /v1/load_lora_adapter refuses (400) what is not inside one of them, hub ids
  too. Adapters that the server is started with, and those of SOKA_BUILDS, are the operator's and not held against it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from soka_vllm import compat
from soka_vllm.places import BUILDS_VARIABLE, ROOTS_VARIABLE, allowed_roots, find_build, is_inside

_logger = logging.getLogger("vllm.soka")

_operator: ContextVar[bool] = ContextVar("soka_operator", default=False)
_reasons: ContextVar[list[str] | None] = ContextVar("soka_reasons", default=None)


class BuildsResolver(compat.LoRAResolver):  # type: ignore[misc]  # vLLM has no types here
    """Finds adapters in a folder of builds.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """vLLM's question: a request for the adapter of this name, or None. Whether it fits is for the load to say."""
        found = await asyncio.to_thread(find_build, self.folder, lora_name)
        # The number is replaced by vLLM.
        return None if found is None else compat.LoRARequest(lora_name, 1, str(found))


def install() -> None:
    """Register the resolver if SOKA_BUILDS is set, and hold runtime loads against SOKA_ADAPTER_ROOTS.

    Raises:
        ValueError: SOKA_BUILDS is no directory.
    """
    folder = os.environ.get(BUILDS_VARIABLE)
    if folder:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise ValueError(f"{BUILDS_VARIABLE} is {folder!r}: no such directory")
        compat.LoRAResolverRegistry.register_resolver("SoKA builds", BuildsResolver(path.resolve()))
        _wrap_resolve()
    _wrap_runtime_loads()


def _wrap_resolve() -> None:
    """vLLM answers "found but could not be loaded" and logs the reason: add it to the answer."""
    stock_add, stock_resolve = compat.AsyncLLM.add_lora, compat.OpenAIServingModels.resolve_lora

    @functools.wraps(stock_add)
    async def add_lora(self: Any, lora_request: Any) -> Any:
        try:
            return await stock_add(self, lora_request)
        except Exception as error:
            reasons = _reasons.get()
            if reasons is not None:
                reasons.append(str(error))
            raise

    @functools.wraps(stock_resolve)
    async def resolve(self: Any, lora_name: str) -> Any:
        reasons: list[str] = []
        token = _reasons.set(reasons)
        try:
            answer = await stock_resolve(self, lora_name)
        finally:
            _reasons.reset(token)
        if isinstance(answer, compat.ErrorResponse) and reasons:
            answer.error.message = "\n".join([answer.error.message, *dict.fromkeys(reasons)])
        return answer

    compat.AsyncLLM.add_lora = add_lora
    compat.OpenAIServingModels.resolve_lora = resolve


def _wrap_runtime_loads() -> None:
    models = compat.OpenAIServingModels
    stock_load, stock_static = models.load_lora_adapter, models.init_static_loras

    @functools.wraps(stock_static)
    async def init_static(self: Any) -> None:
        token = _operator.set(True)
        try:
            await stock_static(self)
        finally:
            _operator.reset(token)

    @functools.wraps(stock_load)
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        roots = None if _operator.get() else allowed_roots()
        path = request.lora_path or ""
        if roots is not None and path and not await asyncio.to_thread(is_inside, Path(path).expanduser(), roots):
            # Nothing on whether it is there: that is not for whoever asks to know.
            message = f"{path!r} is not an adapter directory inside the folders that {ROOTS_VARIABLE} allows"
            _logger.warning("Refused adapter %r: %s", request.lora_name, message)
            return compat.create_error_response(message)  # 400
        return await stock_load(self, request, base_model_name)

    models.init_static_loras = init_static
    models.load_lora_adapter = load
