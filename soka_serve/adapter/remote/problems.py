"""Failures of file systems in one vocabulary: what is missing, what is not allowed, and what another try may mend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from soka_serve.adapter.remote.address import HUB, Address
from soka_serve.errors import CheckpointError, printable

Kind = Literal["missing", "denied", "no credentials", "passing", "other"]

_DENIED = ("GatedRepoError", "PermissionError", "Forbidden", "Unauthorized", "RefreshError")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")
_MISSING = (
    *("FileNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"),
    *("RemoteEntryNotFoundError", "LocalEntryNotFoundError"),
)
# Also what libraries raise that do not derive from OSError.
_PASSING = (
    *("ConnectionError", "TimeoutError", "FSTimeoutError", "ClientConnectionError", "ServerDisconnectedError"),
    *("ClientPayloadError", "IncompleteRead", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError"),
    *("ConnectionClosedError", "ResponseStreamingError", "TransportError", "ConnectError", "ReadError", "ReadTimeout"),
)

_HINTS = {
    "s3": "s3fs reads AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role; AWS_ENDPOINT_URL "
    "for other stores than AWS; FSSPEC_S3_ANON=true for a public bucket.",
    "gs": "gcsfs reads GOOGLE_APPLICATION_CREDENTIALS or the machine's account; FSSPEC_GS_TOKEN=anon for a public "
    "bucket.",
    HUB: "Log in (`hf auth login`) or set HF_TOKEN; a gated adapter's licence is accepted on its page.",
    "https": "A ~/.netrc with the host's login is read.",
}
_HINTS |= {"s3a": _HINTS["s3"], "gcs": _HINTS["gs"], "http": _HINTS["https"]}


class FetchError(CheckpointError):
    """An adapter that cannot be fetched.

    Args:
        message, hint: as of a SokaError.
        kind: of the failure.
    """

    def __init__(self, message: str, *, hint: str | None = None, kind: Kind = "other") -> None:
        super().__init__(message, hint=hint)
        self.kind: Kind = kind


def kind_of(error: BaseException) -> Kind:
    """What an exception of a file system means, by its own class and HTTP status, or those of its causes.

    fsspec's HTTP says "file not found" of whatever goes wrong: there the cause tells.
    """
    for one in _causes(error):
        if type(one) is FileNotFoundError and type(one.__cause__).__module__.startswith("aiohttp"):
            continue
        kind = _kind_of_one(one)
        if kind != "other":
            return kind
    return "other"


def is_offline(error: BaseException) -> bool:
    """Whether the user has switched a hub off (HF_HUB_OFFLINE)."""
    return any(type(one).__name__ == "OfflineModeIsEnabled" for one in _causes(error))


def explain(address: Address, error: BaseException, what: str = "") -> FetchError:
    """A failure as an error that names the address, what came, and what to do."""
    kind = kind_of(error)
    place = f"{address}: {what}" if what else str(address)
    shown = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    said = printable(f"{type(shown).__name__}: {without_queries(str(shown))}", 300)
    login = _HINTS.get(address.scheme, "Credentials come from the environment, as fsspec's file system of it says.")
    if kind == "missing":
        return FetchError(f"{place}: not found ({said})", hint=_missing_hint(address), kind=kind)
    if kind == "denied":
        return FetchError(f"{place}: access denied ({said})", hint=login, kind=kind)
    if kind == "no credentials":
        return FetchError(f"{place}: no credentials ({said})", hint=login, kind=kind)
    if kind == "passing":
        hint = "Check the network, the host or endpoint, and proxies; then run the same again."
        if is_offline(error):
            hint = "HF_HUB_OFFLINE is set: unset it, or fetch the adapter beforehand (`hf download`)."
        return FetchError(f"{place}: cannot be reached ({said})", hint=hint, kind=kind)
    return FetchError(f"{place}: cannot be read ({said})", hint="Check the address.", kind=kind)


def without_queries(text: str) -> str:
    """A text without the queries of the URLs in it: a redirect's may hold a signature."""
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\")]*", r"\1?...", text)


def _missing_hint(address: Address) -> str:
    if address.scheme == HUB:
        return "Check the id and the revision (it may have moved); a private one needs `hf auth login` or HF_TOKEN."
    return "Check bucket, host and folder: it must hold adapter_config.json and adapter_model.safetensors."


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _kind_of_one(error: BaseException) -> Kind:
    status = _status(error)
    names = {base.__name__ for base in type(error).__mro__}
    if names.intersection(_NO_CREDENTIALS):
        return "no credentials"
    if names.intersection(_DENIED):
        return "denied"
    if names.intersection(_MISSING):  # a hub answers 401 for what is not there
        return "missing"
    if status in (401, 403):
        return "denied"
    if status in (404, 410):
        return "missing"
    if status is not None and (status in (408, 425, 429) or status >= 500):
        return "passing"
    return "passing" if names.intersection(_PASSING) else "other"


def _status(error: BaseException) -> int | None:
    """The HTTP status that aiohttp, httpx, botocore and gcsfs put into their exceptions."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for part, name in ((error, "status"), (response, "status_code"), (error, "code")):
        said = response if isinstance(response, int) else getattr(part, name, None)
        if isinstance(said, str) and said.isdecimal() and len(said) == 3:
            said = int(said)
        if isinstance(said, int) and 100 <= said < 600:
            return said
    return None
