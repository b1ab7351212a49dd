"""Where adapters are kept: what files an address has, their sizes and versions, and their contents as streams."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from soka_serve.adapter.remote.address import HUB, Address
from soka_serve.adapter.remote.problems import FetchError, kind_of, without_queries
from soka_serve.errors import install_extra
from soka_serve.io.file_names import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.safetensors import PICKLE_SUFFIXES
from soka_serve.io.warn_once import warn

log = logging.getLogger(__name__)

CONNECT_S, READ_S = 10, 60
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# What tells versions of a file apart, by the names of the file systems.
_VERSIONS = (
    *("ETag", "etag", "VersionId", "generation", "LastModified", "Last-Modified", "last_modified", "mtime", "created"),
    *("content_md5", "md5Hash", "Content-MD5"),
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of an adapter.

    Args:
        path: as its store knows it.
        size: bytes; None where the store does not say.
        version: changes with its content; empty where the store says nothing of the kind.
        digest: algorithm ('sha256', 'md5', 'git') and hex digits of its content; None where the store gives none.
    """

    path: str
    size: int | None
    version: str
    digest: tuple[str, str] | None = None


Listing = Mapping[str, RemoteFile]


class Store(Protocol):
    """An address, opened."""

    def look(self) -> Listing:
        """The files of the adapter by name, as they are now. FetchError and whatever the file system raises."""

    def open(self, file: RemoteFile) -> BinaryIO:
        """The content of a file, from its beginning."""


def open_store(address: Address) -> Store:
    """Open an address.

    Raises:
        FetchError: nothing here can open such a URL.
    """
    return HubStore(address) if address.scheme == HUB else FileStore(address)


def check_scheme(address: Address) -> None:
    """Refuse an address of a kind that nothing here can open; no store is asked.

    Raises:
        FetchError: fsspec does not know it, or it needs a package that is not installed.
    """
    if address.scheme == HUB:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(address.scheme)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(address.scheme)
        hint = install_extra(extra) if extra else "Install the package that it names."
        known = isinstance(error, ImportError)
        message = f"{address}: needs a package that is not installed ({error})" if known else f"{address}: {error}"
        raise FetchError(message, hint=hint if known else "fsspec knows no such kind of URL.") from error


class FileStore:
    """A folder of one of fsspec's file systems."""

    def __init__(self, address: Address) -> None:
        import fsspec

        self.address = address
        check_scheme(address)
        self._fs: Any = fsspec.filesystem(address.scheme, **_options(address.scheme))

    def look(self) -> Listing:
        """See `Store`."""
        self._fs.invalidate_cache()
        root = self.address.location
        refused: Exception | None = None
        for folder in (root, f"{root}/adapter"):
            try:
                config = self._info(f"{folder}/{CONFIG_FILE}")
            except Exception as error:
                if kind_of(error) != "denied":
                    raise
                refused = refused or error
                continue
            if config is not None:
                return {CONFIG_FILE: config, WEIGHTS_FILE: self._weights(folder), **self._others(folder)}
        if refused is not None:
            raise refused
        message = f"{self.address}: no {CONFIG_FILE} there, nor in {root}/adapter"
        hint = "Check bucket, host and folder; only adapters are fetched, no merged models."
        raise FetchError(message, hint=hint, kind="missing")

    def open(self, file: RemoteFile) -> BinaryIO:
        """See `Store`."""
        how = {"block_size": 0, "size": file.size} if self.address.scheme in ("http", "https") else {}
        found: BinaryIO = self._fs.open(file.path, "rb", **how)
        answer = getattr(found, "r", None)  # of a web server
        _check_tls(file.path, str(getattr(answer, "url", file.path)))
        return found

    def _info(self, url: str) -> RemoteFile | None:
        """A file; None where there is none."""
        try:
            found = self._fs.info(self._fs._strip_protocol(url))
        except Exception as error:
            if kind_of(error) == "missing":
                return None
            raise
        if found.get("type", "file") != "file":
            return None
        _check_tls(url, str(found.get("url") or url))
        size = found.get("size")
        version = " ".join(f"{key}={found[key]}" for key in _VERSIONS if found.get(key))
        return RemoteFile(found.get("name") or url, int(size) if size is not None else None, version, _md5(found))

    def _weights(self, folder: str) -> RemoteFile:
        found = self._info(f"{folder}/{WEIGHTS_FILE}")
        if found is not None:
            return found
        if self._info(f"{folder}/adapter_model.bin") is not None:
            raise _only_pickles(self.address)
        raise FetchError(
            f"{self.address}: {CONFIG_FILE} is there, {WEIGHTS_FILE} is not",
            hint="Only safetensors are fetched; was the upload cut short?",
            kind="missing",
        )

    def _others(self, folder: str) -> dict[str, RemoteFile]:
        """Provenance and card, which an adapter may lack."""
        found: dict[str, RemoteFile] = {}
        for name in ADAPTER_FILES:
            if name in (CONFIG_FILE, WEIGHTS_FILE):
                continue
            try:
                file = self._info(f"{folder}/{name}")
            except Exception as error:
                if kind_of(error) != "denied":
                    raise
                # So S3 answers for what is missing, where one may read files and not list them.
                warn(log, "%s: access to %s is denied; taken for one that is not there", self.address, name)
                continue
            if file is not None:
                found[name] = file
        return found


class HubStore:
    """An adapter on a Hugging Face hub, at the commit that its revision means when it is opened."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._commit = ""

    def look(self) -> Listing:
        """See `Store`. The commit is that of the first call."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(
            self.address.location, revision=self._commit or self.address.revision, files_metadata=True, timeout=READ_S
        )
        self._commit = str(info.sha)
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        if CONFIG_FILE not in files:
            message = f"{self.address}: no {CONFIG_FILE} in it at commit {self._commit[:12]}"
            raise FetchError(message, hint="Only adapters are fetched, no merged models.", kind="missing")
        if WEIGHTS_FILE not in files:
            if any(name.endswith(suffix) for name in files for suffix in PICKLE_SUFFIXES):
                raise _only_pickles(self.address)
            raise FetchError(f"{self.address}: no {WEIGHTS_FILE} in it", kind="missing")
        return {name: self._file(files[name]) for name in ADAPTER_FILES if name in files}

    def open(self, file: RemoteFile) -> BinaryIO:
        """See `Store`."""
        from huggingface_hub import HfFileSystem

        found: BinaryIO = HfFileSystem().open(file.path, "rb", block_size=0)
        return found

    def _file(self, sibling: Any) -> RemoteFile:
        lfs, blob = sibling.lfs, sibling.blob_id
        digest = ("sha256", str(lfs.sha256)) if lfs else ("git", str(blob)) if blob else None
        path = f"{self.address.location}@{self._commit}/{sibling.rfilename}"
        return RemoteFile(path, sibling.size, self._commit, digest)


def _check_tls(url: str, end: str) -> None:
    """Refuse a redirect from TLS to none."""
    if url.startswith("https:") and not end.startswith("https:"):
        message = f"{url}: leads to a server without TLS, {without_queries(end)}"
        raise FetchError(message, hint="Give the address that it leads to.")


def _only_pickles(address: Address) -> FetchError:
    return FetchError(
        f"{address}: its weights are a pickle, which is never fetched; expected {WEIGHTS_FILE}",
        hint="Save it again as safetensors: PeftModel.save_pretrained(..., safe_serialization=True).",
    )


def _options(scheme: str) -> dict[str, Any]:
    """Time limits for a file system; whatever else it needs it takes from the environment (FSSPEC_S3_..., say)."""
    from fsspec.config import conf

    def given(key: str) -> dict[str, Any]:
        return dict(conf.get(scheme, {}).get(key) or {})

    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": READ_S, **given("config_kwargs")}}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        return {"client_kwargs": {"timeout": limits, "trust_env": True, **given("client_kwargs")}}
    return {}


def _md5(found: Mapping[str, Any]) -> tuple[str, str] | None:
    """The MD5 that Google's and Azure's stores and some web servers give. S3's ETag is none with some encryptions."""
    text = found.get("md5Hash") or found.get("Content-MD5")
    try:
        return ("md5", base64.b64decode(text, validate=True).hex()) if text else None
    except (binascii.Error, TypeError, ValueError):
        return None
