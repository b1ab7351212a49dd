"""Adapters by name from a folder of builds, at the first request; and what the load at hand is allowed to read.

Two environment variables set which folders adapters come from:

- SOKA_BUILDS=FOLDER: a request for a model NAME that is not served yet loads FOLDER/NAME/adapter, or FOLDER/NAME where
  the adapter is there itself. FOLDER may be a URL (`soka_vllm.remote`). vLLM asks its resolvers with
  VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 only. SoKA, LoKr and LoRA alike; vLLM's own filesystem resolver knows LoRA only.
- SOKA_ADAPTER_ROOTS=FOLDER[:FOLDER...]: /v1/load_lora_adapter refuses (400) what is not inside one of them, hub ids
  too. Adapters that the server is started with, and those of SOKA_BUILDS, are the operator's and not held against it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from soka_serve.adapter.remote.address import is_url, local_path, parse_folder
from soka_serve.errors import SokaError
from soka_serve.io.scoped import scoped
from soka_vllm.places import find_build, limited
from soka_vllm.settings import BUILDS_VARIABLE

_operator: ContextVar[bool] = ContextVar("soka_operator", default=False)
# The path that the load at hand was asked for by a client, and the folders that it must lie in.
_limits: ContextVar[tuple[str, Sequence[Path]] | None] = ContextVar("soka_limits", default=None)
_reasons: ContextVar[list[str] | None] = ContextVar("soka_reasons", default=None)


class BuildsResolver(LoRAResolver):  # type: ignore[misc]  # vLLM has no types here
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
        return LoRARequest(lora_name, 1, str(found))  # the number is replaced by vLLM


def register() -> None:
    """Register the resolver if SOKA_BUILDS is set.

    Raises:
        ValueError: SOKA_BUILDS is no directory, and no URL of one.
    """
    folder = os.environ.get(BUILDS_VARIABLE)
    if folder and is_url(folder) and not folder.startswith("file:"):
        from soka_vllm.remote import RemoteResolver

        try:
            LoRAResolverRegistry.register_resolver("SoKA builds", RemoteResolver(parse_folder(folder)))
        except SokaError as error:
            raise ValueError(f"{BUILDS_VARIABLE}: {error.message}") from error
    elif folder:
        path = local_path(folder)
        if not path.is_dir():
            raise ValueError(f"{BUILDS_VARIABLE} is {folder!r}: no such directory")
        LoRAResolverRegistry.register_resolver("SoKA builds", BuildsResolver(path.resolve()))


def limit_to(folder: Path, roots: Sequence[Path]) -> None:
    """The load at hand, of this folder, must lie in `roots`."""
    _limits.set((str(folder), roots))


def limits_of(lora_request: Any) -> Any:
    """In the API process, a request to load as it goes to the engine: with the folders that it must lie in, if any."""
    limits = _limits.get()
    return limited(lora_request, limits[1] if limits is not None and limits[0] == lora_request.lora_path else None)


def operator_loads() -> bool:
    """Whether the load at hand is the operator's, of an adapter on the command line."""
    return _operator.get()


def operator_load() -> AbstractContextManager[bool]:
    """Loads inside are the operator's."""
    return scoped(_operator, True)


def client_load(path: str, roots: Sequence[Path] | None) -> AbstractContextManager[Any]:
    """A load inside, of this path, must lie in `roots`; None: anywhere."""
    return scoped(_limits, None if roots is None else (path, roots))


def reasons_noted() -> AbstractContextManager[list[str] | None]:
    """The reasons why loads inside failed, as they come."""
    return scoped(_reasons, [])


def note_reason(error: Exception) -> None:
    """Add an error to `reasons_noted`, where somebody wants to know."""
    reasons = _reasons.get()
    if reasons is not None:
        reasons.append(str(error))
