"""Fetch an adapter from its address into the cache: within bounds, checked, and visible only in whole."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from soka_serve.adapter.remote.address import HUB, Address, local_path, parse_address
from soka_serve.adapter.remote.cache import AdapterCache, hold
from soka_serve.adapter.remote.problems import FetchError, explain, is_offline
from soka_serve.adapter.remote.store import Listing, RemoteFile, Store, open_store
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import ADAPTER_FILES, CARD_FILE, CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.files import disk_errors
from soka_serve.io.lockfile import read_lock
from soka_serve.io.progress import track
from soka_serve.io.safetensors import read_header
from soka_serve.io.text import size as size_text

log = logging.getLogger(__name__)

TRIES = 4
FIRST_WAIT_S = 0.5  # between tries, then twice as long each time
_MIB = 1 << 20
_LARGEST = {CONFIG_FILE: 16 * _MIB, LOCK_FILE: 8 * _MIB, CARD_FILE: 16 * _MIB}
_SECONDS, _BYTES_PER_S = 300.0, 1e5  # the slowest line that is waited for
_CHUNK = 1 << 20

Result = TypeVar("Result")


def local_adapter(given: str | Path) -> Path:
    """Where an adapter (or anything else that lies on this machine) is: what is kept elsewhere is fetched.

    Args:
        given: a path; or the text of one, a hub id or a URL (`soka_serve.adapter.remote.address`).

    Returns:
        The path as given; of a fetched adapter its folder, which stays as long as this process lives.

    Raises:
        CheckpointError: it cannot be fetched.
        SokaError: the cache cannot be used.
    """
    if isinstance(given, Path):
        return given
    address = parse_address(given)
    if address is None:
        return local_path(given)
    for _ in range(TRIES):
        try:
            found = fetch_adapter(address)
        except FetchError as error:
            if address.scheme != HUB or given.startswith("hf://"):
                raise
            message = f"{address}: no such file or directory; taken for a hub id: {error.message}"
            raise FetchError(message, hint=error.hint, kind=error.kind) from error
        if hold(found) or address.scheme == HUB:  # of a hub's own cache nothing is removed
            return found
    raise FetchError(f"{address}: removed from the cache again and again, as soon as it was there")


def fetch_adapter(address: Address) -> Path:
    """Fetch an adapter unless the cache has what is at its address now.

    Returns:
        Its folder in the cache, which stays for a minute, or longer with `hold`.

    Raises:
        FetchError: it cannot be reached, is not there, is too large, or is not what it should be.
        SokaError: the cache cannot be used.
    """
    cache = AdapterCache.from_environment()
    fixed = _key(str(address))
    if address.is_fixed and (found := cache.find(fixed)) is not None:
        return found
    store = _tried(address, "", partial(open_store, address))
    try:
        listing = _tried(address, "", store.look)
    except FetchError as error:
        if error.kind == "passing" and address.scheme == HUB and (kept := _in_hub_cache(address)) is not None:
            log.warning("%s; taking the copy in the hub's own cache, %s", error.message, kept)
            return kept
        raise
    with cache.fetching(fixed):
        return _Fetch(address, store, cache).run(listing)


@dataclass
class _Fetch:
    """One adapter on its way into the cache."""

    address: Address
    store: Store
    cache: AdapterCache
    digests: dict[str, str] = field(default_factory=dict)  # sha256 of what has come

    def run(self, listing: Listing) -> Path:
        """Fetch until all files are of one version."""
        for _ in range(TRIES):
            key = self._key_of(listing)
            if key and (found := self.cache.find(key)) is not None:
                return found
            with self._room(listing) as folder:
                self._download(listing, folder)
                now = _tried(self.address, "", self.store.look)
                if now == listing:
                    self._check(folder)
                    return self.cache.publish(folder, key or _key(str(self.address), self.digests), self.address.name)
            log.info("%s was changed while it was fetched; fetching it again", self.address)
            listing = now
        raise FetchError(f"{self.address}: is changed again and again while it is fetched", hint="Try later.")

    def _key_of(self, listing: Listing) -> str:
        """The cache's key of a version; empty where the store does not tell versions apart."""
        if self.address.is_fixed:
            return _key(str(self.address))
        if not all(file.version for file in listing.values()):
            return ""
        return _key(str(self.address), {name: (file.size, file.version) for name, file in listing.items()})

    @contextmanager
    def _room(self, listing: Listing) -> Iterator[Path]:
        for name, file in listing.items():
            most = _LARGEST.get(name, self.cache.limit)
            if file.size is None and name == WEIGHTS_FILE:
                hint = "Its server must send Content-Length."
                raise FetchError(f"{self.address}: the size of {name} is not said, so it is not fetched", hint=hint)
            if file.size is not None and file.size > most:
                message = f"{self.address}: {name} has {size_text(file.size)}; at most {size_text(most)} are fetched"
                raise FetchError(message, hint="The limit of weights is the cache's, SOKA_ADAPTER_CACHE_GIB.")
        try:
            with self.cache.room({name: file.size or 0 for name, file in listing.items()}) as folder:
                yield folder
        except FetchError as error:
            if str(self.address) in error.message:
                raise
            raise FetchError(f"{self.address}: {error.message}", hint=error.hint, kind=error.kind) from error

    def _download(self, listing: Listing, folder: Path) -> None:
        total = sum(file.size or 0 for file in listing.values())
        ends = time.monotonic() + _SECONDS + total / _BYTES_PER_S
        with track(total, f"fetching {self.address}", unit="B") as advance:
            for name, file in listing.items():
                copy = partial(self._copy, name, file, folder / name, ends)
                self.digests[name] = _tried(self.address, name, copy)
                advance(by=file.size or 0)

    def _copy(self, name: str, file: RemoteFile, target: Path, ends: float) -> str:
        """Copy one file and return its sha256."""
        most = file.size if file.size is not None else _LARGEST[name]
        with closing(self.store.open(file)) as stream, _Target(target) as out:
            while part := stream.read(_CHUNK):
                if out.count + len(part) > most:
                    raise FetchError(f"{self.address}: {name}: more than the {most} bytes came that it may have")
                if time.monotonic() > ends:
                    raise FetchError(f"{self.address}: {name}: too slow: {out.count} bytes came so far")
                out.write(part)
        if file.size is not None and out.count != file.size:
            message = f"{self.address}: {name}: {file.size} bytes expected, {out.count} came"
            raise FetchError(message, kind="passing")
        if file.digest is not None and _digest(file.digest[0], target) != file.digest[1]:
            message = f"{self.address}: {name}: its {file.digest[0]} hash is not {file.digest[1]}, as its store says"
            raise FetchError(message, kind="passing")
        return out.sha256.hexdigest()

    def _check(self, folder: Path) -> None:
        """What can be told of the files before they are used: the pin, the adapter's own hash, and a whole header."""
        came = self.digests[WEIGHTS_FILE]
        if self.address.sha256 not in (None, came):
            raise FetchError(
                f"{self.address}: {WEIGHTS_FILE} has sha256 {came}", hint="It was replaced, or the pin is of another."
            )
        try:
            read_header(folder / WEIGHTS_FILE, ReadingBudget())
            lock = read_lock(folder / LOCK_FILE) if (folder / LOCK_FILE).exists() else {}
        except CheckpointError as error:
            message = error.message.replace(str(folder), str(self.address))
            raise FetchError(message, hint="It is damaged where it is kept: upload it again.") from error
        own = lock.get("adapter")
        stamped = own.get("sha256") if isinstance(own, dict) else None
        if stamped not in (None, came):
            raise FetchError(
                f"{self.address}: {WEIGHTS_FILE} has sha256 {came}; its {LOCK_FILE} says {stamped!s:.64}",
                hint="Its files are of two builds, or damaged: upload the adapter again as a whole.",
            )


class _Target:
    """A file that is written anew. What the disk refuses is told from what the network does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.sha256 = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Target:
        with disk_errors(self.path):
            self._file = self.path.open("r+b")
        return self

    def write(self, part: bytes) -> None:
        """Append bytes."""
        assert self._file is not None
        with disk_errors(self.path):
            self._file.write(part)
        self.sha256.update(part)
        self.count += len(part)

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with disk_errors(self.path), self._file as file:
            file.truncate(self.count)
            file.flush()
            os.fsync(file.fileno())


def _tried(address: Address, what: str, call: Callable[[], Result]) -> Result:
    """What a call returns, after several tries where the network fails."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            if isinstance(error, SokaError) and not isinstance(error, FetchError):
                raise
            failure = error if isinstance(error, FetchError) else explain(address, error, what)
            if failure.kind != "passing" or attempt == TRIES or is_offline(error):
                raise failure from (None if failure is error else error)
            wait = FIRST_WAIT_S * 2 ** (attempt - 1)
            log.warning("%s; trying again in %.1f s (%d of %d)", failure.message, wait, attempt, TRIES)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _digest(algorithm: str, file: Path) -> str:
    if algorithm == "git":
        blob = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
        with file.open("rb") as stream:
            while part := stream.read(_CHUNK):
                blob.update(part)
        return blob.hexdigest()
    with file.open("rb") as stream:
        found: Any = hashlib.file_digest(stream, algorithm)
    return str(found.hexdigest())


def _in_hub_cache(address: Address) -> Path | None:
    """The adapter in huggingface_hub's own cache, as `hf download` leaves it; for machines without a network."""
    if address.sha256 is not None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            address.location, revision=address.revision, local_files_only=True, allow_patterns=list(ADAPTER_FILES)
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    found = Path(folder)
    return found if (found / CONFIG_FILE).is_file() and (found / WEIGHTS_FILE).is_file() else None


def _key(address: str, versions: dict[str, Any] | None = None) -> str:
    text = "\n".join([address, *(f"{name} {version}" for name, version in sorted((versions or {}).items()))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
