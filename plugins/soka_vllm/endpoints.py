"""vLLM's list of served models, which the API asks: loads, names that are not loaded yet or not there, and unloads."""

from __future__ import annotations

import asyncio
import logging
import time
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from vllm import envs
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMNotFoundError

from soka_serve.adapter.remote.address import Address, is_url
from soka_serve.adapter.remote.problems import FetchError
from soka_serve.errors import SokaError, is_printable, printable
from soka_serve.io.names import MODEL_NAME_RULE, is_model_name
from soka_vllm import metrics, remote
from soka_vllm.folders import OutsideError, lies_in
from soka_vllm.names import build_names, missing_model
from soka_vllm.places import Locks, adapter_directory, allowed_roots
from soka_vllm.resolver import BuildsResolver, client_load, operator_load, operator_loads, reasons_noted
from soka_vllm.served_sums import MissingError, begin_request, sums_of
from soka_vllm.store import loaded_already
from soka_vllm.sums import is_sum

_LISTING_SECONDS = 2.0

_logger = logging.getLogger("vllm.soka")

# Why the model of the request at hand cannot be fetched; vLLM's check answers 404 whatever it is.
_unfetched: ContextVar[ErrorResponse | None] = ContextVar("soka_unfetched", default=None)


def make_models(stock: Any, models: Any, *arguments: Any, **options: Any) -> None:
    """OpenAIServingModels.__init__."""
    stock(models, *arguments, **options)
    models.lora_resolver_lock = Locks()


async def load_static(stock: Any, models: Any) -> None:
    """OpenAIServingModels.init_static_loras: the adapters of the command line."""
    with operator_load():
        await stock(models)


async def resolve(stock: Any, models: Any, lora_name: str) -> Any:
    """OpenAIServingModels.resolve_lora.

    vLLM answers "found but could not be loaded" and logs the reason; the answer has it, too.
    """
    if not is_model_name(lora_name) or sums_of(models).find(lora_name) is not None:
        missing = f"The model '{printable(lora_name)}' does not exist"  # to `check_model`, which knows more
        return create_error_response(missing, err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND)
    remote.begin_request()
    with reasons_noted() as reasons:
        try:
            answer = await stock(models, lora_name)
        except SokaError as error:
            answer = _not_fetched(lora_name, error)
            _unfetched.set(answer)
            return answer
    if (fetched := remote.last_fetched()) is not None:
        if isinstance(answer, ErrorResponse):
            _forget(models, fetched[0])
        else:
            remote.remember(*fetched)  # a refused load of the same has forgotten it meanwhile
    if isinstance(answer, ErrorResponse) and reasons:
        answer.error.message = "\n".join([answer.error.message, *dict.fromkeys(reasons)])
    return answer


async def check_model(stock: Any, serving: Any, request: Any) -> Any:
    """BaseServing._check_model: a sum of adapters is one; of a model that does not exist, the answer says which do."""
    begin_request()
    _unfetched.set(None)
    served = getattr(serving.models, "lora_requests", {}).get(request.model)
    if served is not None:
        await remote.keep(served.lora_path)
    answer = await stock(serving, request)
    if isinstance(answer, ErrorResponse) and (unfetched := _unfetched.get()) is not None:
        return unfetched
    missing = isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.NOT_FOUND
    if not missing and not (answer is None and envs.VLLM_SKIP_MODEL_NAME_VALIDATION):  # any name is the base's then
        return answer
    models, parts = serving.models, []
    try:
        found = await sums_of(models).ask(request.model)
        if found is not None:
            return found if isinstance(found, ErrorResponse) else None
    except MissingError as error:
        parts = error.names
    if missing:
        bases = [base.name for base in models.base_model_paths]
        adapters = sorted({*models.lora_requests, *await _loaded_when_asked(models)})
        answer.error.message = await asyncio.to_thread(missing_model, str(request.model), bases, adapters, parts)
    return answer


async def check_pooling_model(stock: Any, serving: Any, request: Any) -> None:
    """PoolingBaseServing._check_model: as `check_model`. vLLM's takes any name and looks at no answer.

    Raises:
        VLLMNotFoundError: no such model.
        HTTPException: why an adapter cannot be served, or fetched.
    """

    async def known(serving: Any, request: Any) -> ErrorResponse | None:
        await stock(serving, request)  # loads what comes by its name
        if serving._is_model_supported(request.model) or request.model in serving.models.lora_requests:
            return None
        return create_error_response("", err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND)

    answer = await check_model(known, serving, request)
    if isinstance(answer, ErrorResponse):
        if answer.error.code == HTTPStatus.NOT_FOUND:
            raise VLLMNotFoundError(answer.error.message)
        raise HTTPException(answer.error.code, answer.error.message)


def get_adapters(stock: Any, serving: Any, request: Any, *arguments: Any, **options: Any) -> Any:
    """BaseServing._maybe_get_adapters: the sum of adapters that a request asks for is its adapter."""
    found = sums_of(serving.models).find(request.model)
    return stock(serving, request, *arguments, **options) if found is None else found


async def _loaded_when_asked(models: Any) -> list[str]:
    """Names in the folder of builds, as they were at most two seconds ago: anyone may ask for what is not there."""
    resolvers = getattr(models, "lora_resolvers", ())  # a server that only renders has none
    folders = [resolver.folder for resolver in resolvers if isinstance(resolver, BuildsResolver)]
    if not folders or not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        return []
    read, names = models.__dict__.get("_soka_builds", (0.0, []))
    if time.monotonic() > read + _LISTING_SECONDS:
        names = await asyncio.to_thread(build_names, folders[0])
        models._soka_builds = time.monotonic(), names
    return list(names)


async def load(stock: Any, models: Any, request: Any, base_model_name: str | None = None) -> Any:
    """OpenAIServingModels.load_lora_adapter: of a client at runtime, and of the command line.

    A refused adapter is the caller's mistake (400), not the server's (500), while the engine lives.
    """
    path = request.lora_path or ""
    roots = None if operator_loads() else allowed_roots()
    message, address = _refusal(request.lora_name, path), None
    if not message and path and models.is_base_model(request.lora_name):  # as vLLM itself does from 0.31 on
        message = f"The lora adapter '{request.lora_name}' conflicts with a served base model."
    if not message:
        try:
            address = _address(models, path)
            found = None if address is None else await remote.fetch(address)
        except SokaError as error:
            return _not_fetched(request.lora_name, error)
        if found is not None:
            path, roots = str(found), remote.folders_of(found)
            request = request.model_copy(update={"lora_path": path})
    if not message and roots is not None and path:
        directory = adapter_directory(path, roots)
        if not await asyncio.to_thread(lies_in, directory, roots):
            message = str(OutsideError(Path(path)))
    from_command_line = [module.path for module in models.static_lora_modules or ()]
    if not message and ".." in Path(path).parts and path not in from_command_line:
        message = f"{request.lora_name}: '..' in the path of an adapter; give the folder itself"
    if message:
        _logger.warning("Refused adapter '%s': %s", printable(request.lora_name), message)
        return create_error_response(message)  # 400
    former = models.lora_requests.get(request.lora_name)
    with client_load(path, roots):
        answer = await stock(models, request, base_model_name)
    failed = isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.INTERNAL_SERVER_ERROR
    if failed and not models.engine_client.errored:
        _logger.warning("Refused adapter %r from %s: %s", request.lora_name, path, answer.error.message)
        answer.error.code = HTTPStatus.BAD_REQUEST.value
        answer.error.type = "BadRequestError"
    if isinstance(answer, ErrorResponse):
        _forget(models, path)
        return answer
    if address is not None:
        remote.remember(path, address)  # a refused load of the same has forgotten it meanwhile
    if request.load_inplace:
        # Else every request would ask for the files to be read again.
        models.lora_requests[request.lora_name] = loaded_already(models.lora_requests[request.lora_name])
        sums_of(models).reloaded(request.lora_name)
    if former is not None:
        _forget(models, former.lora_path)
    return answer


async def unload(stock: Any, models: Any, request: Any) -> Any:
    """OpenAIServingModels.unload_lora_adapter."""
    served = models.lora_requests.get(request.lora_name)
    answer = await stock(models, request)
    if not isinstance(answer, ErrorResponse):
        if served is not None:
            _forget(models, served.lora_path)
        metrics.counters().unloaded(request.lora_name)
        sums_of(models).unloaded(request.lora_name)
    return answer


def _forget(models: Any, path: str) -> None:
    """Forget where an adapter was fetched from, unless another name serves it."""
    if all(served.lora_path != path for served in models.lora_requests.values()):
        remote.forget(path)


def _address(models: Any, path: str) -> Address | None:
    """Where an adapter that is kept elsewhere is; None where a load names a path of this machine.

    Clients may have loaded what lies below the URL of the builds, and hub ids where no folders are set.

    Raises:
        SokaError: not allowed.
    """
    if is_url(path) and path.startswith("file:"):
        raise SokaError(f"'{printable(path)}': give the folder as a path")
    free = operator_loads()
    if not free and not is_url(path):
        if allowed_roots() is not None:
            return None
        free = True
    folders = [r.folder for r in getattr(models, "lora_resolvers", ()) if isinstance(r, remote.RemoteResolver)]
    return remote.address_of(path, folders, free=free)


def _not_fetched(name: str, error: SokaError) -> ErrorResponse:
    """The answer about an adapter that cannot be fetched: 503 where another try, or the operator, can mend it."""
    _logger.warning("Adapter '%s' is not fetched: %s%s", printable(name), error.message, f" {error.hint or ''}")
    mendable = isinstance(error, FetchError) and error.kind in ("passing", "denied", "no credentials")
    status = HTTPStatus.SERVICE_UNAVAILABLE if mendable else HTTPStatus.BAD_REQUEST
    kind = "ServiceUnavailableError" if mendable else "BadRequestError"
    return create_error_response(f"{printable(name)}: {error.message}", err_type=kind, status_code=status)


def _refusal(name: str, path: str) -> str:
    """Why a name or a path cannot be an adapter's; empty where it can. vLLM itself refuses empty ones."""
    if name and not is_model_name(name):
        return f"'{printable(name)}' cannot name an adapter: {MODEL_NAME_RULE}"
    if not is_printable(path):
        return f"'{printable(path)}': a path with control characters, such as a null or a line end, is not served"
    if is_sum(path):
        return f"'{printable(path)}': a sum of adapters is not loaded; ask for it by its name, such as math+0.5*code"
    return ""
