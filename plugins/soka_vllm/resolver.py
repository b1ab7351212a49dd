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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

from soka_serve.errors import is_printable, printable
from soka_serve.io.names import MODEL_NAME_RULE, is_model_name
from soka_vllm import compat
from soka_vllm.opened import OutsideError, opened, renamed
from soka_vllm.places import BUILDS_VARIABLE, Locks, allowed_roots, find_build, is_inside, limited, roots_of

_logger = logging.getLogger("vllm.soka")

_LONGEST_REASON = 4000  # characters of why an adapter is refused

_operator: ContextVar[bool] = ContextVar("soka_operator", default=False)
# The path that the load at hand was asked for by a client, and the folders that it must lie in.
_limits: ContextVar[tuple[str, Sequence[Path]] | None] = ContextVar("soka_limits", default=None)
_reasons: ContextVar[list[str] | None] = ContextVar("soka_reasons", default=None)


class BuildsResolver(compat.LoRAResolver):  # type: ignore[misc]  # vLLM has no types here
    """Finds adapters in a folder of builds.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a LoRARequest for the adapter of this name, or None; the load checks whether it fits."""
        found = await asyncio.to_thread(find_build, self.folder, lora_name)
        if found is None:
            return None
        _limits.set((str(found), [self.folder]))
        return compat.LoRARequest(lora_name, 1, str(found))  # the number is replaced by vLLM


@contextmanager
def adapter_files(lora_request: Any) -> Iterator[Path]:
    """A directory with the files of an adapter that is to be loaded, opened and held to where they may lie.

    Raises:
        ValueError: whatever goes wrong within, as a message that names the adapter's own path and that a terminal may
            show.
    """
    roots = roots_of(lora_request)
    with opened(compat.adapter_directory(lora_request.lora_path, roots), roots) as files:
        try:
            yield files
        except Exception as error:
            text = renamed(str(error) or type(error).__name__, files, lora_request.lora_path)
            raise ValueError(printable(text, _LONGEST_REASON, keep="\n")) from error


def limits_of(lora_request: Any) -> Any:
    """In the API process, a request to load as it goes to the engine: with the folders that it must lie in, if any."""
    limits = _limits.get()
    return limited(lora_request, limits[1] if limits is not None and limits[0] == lora_request.lora_path else None)


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
    _wrap_locks()


def _wrap_resolve() -> None:
    """vLLM answers "found but could not be loaded" and logs the reason: add it to the answer.

    Names that no adapter can have are answered at once: no resolver makes a path of them.
    """
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
        if not is_model_name(lora_name):
            return compat.create_error_response(
                f"The model '{printable(lora_name)}' does not exist; {MODEL_NAME_RULE}",
                err_type="NotFoundError",
                status_code=HTTPStatus.NOT_FOUND,
            )
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
        message = _refusal(request.lora_name, path)
        if not message and roots is not None and path:
            directory = compat.adapter_directory(path, roots)
            if not await asyncio.to_thread(is_inside, directory, roots):
                message = str(OutsideError(Path(path)))
        if message:
            _logger.warning("Refused adapter '%s': %s", printable(request.lora_name), message)
            return compat.create_error_response(message)  # 400
        token = _limits.set(None if roots is None else (path, roots))
        try:
            return await stock_load(self, request, base_model_name)
        finally:
            _limits.reset(token)

    models.init_static_loras = init_static
    models.load_lora_adapter = load


def _refusal(name: str, path: str) -> str:
    """Why a name or a path cannot be an adapter's; empty where it can. vLLM itself refuses empty ones."""
    if name and not is_model_name(name):
        return f"'{printable(name)}' cannot name an adapter: {MODEL_NAME_RULE}"
    if not is_printable(path):
        return f"'{printable(path)}': a path with control characters, such as a null or a line end, is not served"
    return ""


def _wrap_locks() -> None:
    """Drop locks that nobody holds: vLLM keeps one for every name that it was ever asked for."""
    stock = compat.OpenAIServingModels.__init__

    @functools.wraps(stock)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **options)
        self.lora_resolver_lock = Locks()

    compat.OpenAIServingModels.__init__ = init
