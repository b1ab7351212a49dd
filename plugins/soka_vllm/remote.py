"""Adapters that are kept elsewhere, seen from the API process: fetched into the cache, and fetched again if need be.

The engine and its workers see folders of the cache only, so that none of them waits for a network.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from soka_serve.adapter.remote.address import Address, parse_address
from soka_serve.adapter.remote.cache import touch
from soka_serve.adapter.remote.fetch import fetch_adapter
from soka_serve.adapter.remote.problems import FetchError
from soka_serve.errors import SokaError, printable
from soka_vllm.places import is_build_name

_logger = logging.getLogger("vllm.soka")

# Threads of their own: a slow store takes none of those that check adapters of this machine.
_threads = ThreadPoolExecutor(4, "soka-fetch")
_fetched: dict[str, Address] = {}  # by folder in the cache
_keeping: dict[str, asyncio.Future[None]] = {}  # fetches that run, by folder
_not_kept: dict[str, tuple[float, float]] = {}  # until when a folder is not fetched again, and how long that is
_last: ContextVar[tuple[str, Address] | None] = ContextVar("soka_last_fetched", default=None)
# Anyone may ask for what is not there or damaged, and each time a store would be asked, and the latter fetched.
_FAILED_S = 5.0
_MOST_FAILED = 1000
_LONGEST_PAUSE_S = 300.0  # after several failures in a row to fetch what is served
_WAIT_S = 2.0  # that a request waits for files which the engine may not need


class RemoteResolver(LoRAResolver):  # type: ignore[misc]  # vLLM has no types here
    """Finds adapters by name below a URL.

    Args:
        folder: the URL, as `parse_folder` gives it.
    """

    def __init__(self, folder: Address) -> None:
        self.folder = folder
        self._failed: dict[str, tuple[float, FetchError]] = {}

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a LoRARequest for the adapter of this name, or None; the load checks whether it fits.

        Raises:
            SokaError: it is there, or may be, and cannot be fetched.
        """
        from soka_vllm.resolver import limit_to

        if not is_build_name(lora_name):
            return None
        until, failure = self._failed.get(lora_name, (0.0, None))
        if failure is None or until <= time.monotonic():
            try:
                found = await fetch(self.folder.below(lora_name))
            except FetchError as error:
                failure = FetchError(error.message, hint=error.hint, kind=error.kind)
                if error.kind in ("missing", "other"):  # the rest may be mended at any moment
                    self._note(lora_name, failure)
            else:
                limit_to(found, folders_of(found))
                return LoRARequest(lora_name, 1, str(found))  # the number is replaced by vLLM
        if failure.kind == "missing":
            return None
        raise FetchError(failure.message, hint=failure.hint, kind=failure.kind)

    def _note(self, name: str, failure: FetchError) -> None:
        if len(self._failed) >= _MOST_FAILED:
            self._failed.clear()
        self._failed[name] = time.monotonic() + _FAILED_S, failure


async def fetch(address: Address) -> Path:
    """The folder of an adapter in the cache; it is fetched if it is not there.

    Raises:
        SokaError: it cannot be.
    """
    found = await asyncio.get_running_loop().run_in_executor(_threads, fetch_adapter, address)
    remember(str(found), address)
    _last.set((str(found), address))
    return found


def last_fetched() -> tuple[str, Address] | None:
    """The folder that the request at hand had fetched last, since it began (`begin_request`), and where from."""
    return _last.get()


def begin_request() -> None:
    """Nothing has been fetched for this request yet."""
    _last.set(None)


def remember(path: str, address: Address) -> None:
    """Note where a folder of the cache was fetched from."""
    _fetched[path] = address


def folders_of(found: Path) -> list[Path]:
    """Folders in which the files of a fetched adapter lie: in a hub's own cache they are links to a folder beside."""
    blobs = found.parent.parent / "blobs"
    return [found, blobs] if found.parent.name == "snapshots" and blobs.is_dir() else [found]


async def keep(path: str) -> None:
    """Mark a served adapter's folder as used, and fetch it again where the cache has dropped it.

    Where that fails or takes long, the adapter may still be in memory: the engine tells whether it needs the files.
    """
    address = _fetched.get(path)
    if address is None:
        return
    try:
        touch(Path(path))
    except FileNotFoundError:
        if _not_kept.get(path, (0.0, 0.0))[0] > time.monotonic():
            return
        running = _keeping.get(path)
        if running is None:  # requests for the same adapter wait for one fetch
            running = _keeping[path] = asyncio.ensure_future(_fetch_again(path, address))
            running.add_done_callback(lambda _: _keeping.pop(path, None))
        await asyncio.wait([running], timeout=_WAIT_S)  # it goes on
    except OSError:
        _logger.debug("%s cannot be marked as used", path, exc_info=True)  # somebody else's cache


async def _fetch_again(path: str, address: Address) -> None:
    """Have what the cache has dropped in it again; after a failure not for some seconds, longer each time."""
    _, pause = _not_kept.pop(path, (0.0, 0.0))
    try:
        found = await fetch(address)
    except SokaError as error:
        _logger.warning("The cache has dropped an adapter that is served: %s", error.message)
    else:
        if str(found) == path:
            return
        _logger.warning("The cache has dropped an adapter that is served, and %s holds another now", address)
    if len(_not_kept) >= _MOST_FAILED:
        _not_kept.clear()
    pause = min(max(2 * pause, _FAILED_S), _LONGEST_PAUSE_S)
    _not_kept[path] = time.monotonic() + pause, pause


def forget(path: str) -> None:
    """An adapter is served no more."""
    _fetched.pop(path, None)
    _not_kept.pop(path, None)


def address_of(path: str, folders: list[Address], *, free: bool) -> Address | None:
    """The address that a load was asked for with; None where that is a path of this machine.

    Args:
        path: what came.
        folders: URLs below which adapters may be loaded.
        free: whether everything may be loaded, as on the command line.

    Raises:
        SokaError: no address, or one outside of the folders.
    """
    address = parse_address(path)
    if address is None or free:
        return address
    if any(_is_below(address, folder) for folder in folders):
        return address
    where = ", ".join(map(str, folders))
    raise SokaError(f"'{printable(path)}' is not below {where}" if where else f"'{printable(path)}': no URL is allowed")


def _is_below(address: Address, folder: Address) -> bool:
    return address.scheme == folder.scheme and address.location.startswith(f"{folder.location}/")
