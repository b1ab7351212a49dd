"""Addresses of adapters: hub ids with a revision, and URLs that fsspec knows; each may end in a pin of the weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from soka_serve.errors import CheckpointError, is_printable, printable

HUB = "hf"
EXPECTED = (
    "Expected a folder, a hub id (owner/name, owner/name@revision) or the URL of a folder (s3://bucket/folder, gs://, "
    "https://), each but the first with @sha256:HEX at the end if you like."
)

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")
_PIN = re.compile(r"(.+)@sha256:(.*)", re.DOTALL)
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_HUB_OWNER = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILES = (".toml", ".safetensors", ".json")  # a hub's names could end so, a mistyped path does
_LONGEST = 1000


@dataclass(frozen=True)
class Address:
    """Where an adapter is kept.

    Args:
        scheme: of the URL; 'hf' for a hub.
        location: the URL of its folder without a slash at the end; of a hub 'owner/name'.
        revision: of a hub: branch, tag or commit; None is the default branch.
        sha256: what its weights file must have; None: whatever is there.
    """

    scheme: str
    location: str
    revision: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What to call it without a better name: its last component, of a build's adapter the build's."""
        parts = [part for part in self.location.split("/") if part]
        return printable(parts[-2] if parts[-1] == "adapter" and len(parts) > 3 else parts[-1])

    @property
    def is_fixed(self) -> bool:
        """Whether it can mean one content only, so that what was fetched once need not be asked for again."""
        return self.sha256 is not None or (self.revision is not None and bool(_COMMIT.fullmatch(self.revision)))

    @property
    def url(self) -> str:
        """The location as a URL."""
        return f"{HUB}://{self.location}" if self.scheme == HUB else self.location

    def below(self, name: str) -> Address:
        """The adapter `name` in this folder, or of this owner on a hub."""
        return replace(self, location=f"{self.location}/{name}")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        pin = f"@sha256:{self.sha256}" if self.sha256 else ""
        return printable(f"{self.location}{revision}{pin}", _LONGEST)


def parse_address(text: str) -> Address | None:
    """What a user calls an adapter -> its address; None where that is a path of this machine.

    Something that exists is a path. So is a text of two parts whose first is a folder here: a mistyped path is not
    asked of a hub.

    >>> str(parse_address("s3://bucket/adapters/math/")), parse_address("./math")
    ('s3://bucket/adapters/math', None)
    >>> parse_address("owner/math@v2")
    Address(scheme='hf', location='owner/math', revision='v2', sha256=None)

    Raises:
        CheckpointError: a URL that is none of an adapter, or that holds a secret.
    """
    if _URL.match(text):
        return _parse_url(text)
    if os.path.lexists(text):
        return None
    rest, sha256 = _split_pin(text)
    found = _HUB_ID.fullmatch(rest)
    if found is None or found[1].endswith(_FILES):
        return None
    if found[2] is None and sha256 is None and Path(rest.partition("/")[0]).is_dir():
        return None
    return _hub(found, sha256)


def is_url(text: str) -> bool:
    """Whether a text begins as a URL does."""
    return _URL.match(text) is not None


def parse_folder(text: str) -> Address:
    """The URL of a folder that holds adapters by name; `hf://owner` for all of a hub's owner.

    Raises:
        CheckpointError: no such URL, or one with a pin.
    """
    address = _parse_url(text, folder=True)
    if address is None or address.sha256 is not None:
        raise CheckpointError(f"{_shown(text)}: expected the URL of a folder that holds adapters", hint=EXPECTED)
    return address


def _parse_url(text: str, *, folder: bool = False) -> Address | None:
    rest, sha256 = _split_pin(text)
    scheme = rest.partition("://")[0].lower()
    problem = _url_problem(rest)
    if problem:
        raise CheckpointError(f"{_shown(text)}: {problem}", hint=EXPECTED)
    path = rest.partition("://")[2].rstrip("/")
    if scheme == "file" or scheme == "local":
        if sha256 is not None:
            raise CheckpointError(f"{_shown(text)}: a pin is for what is fetched", hint="Leave @sha256:... out.")
        return None
    if scheme == HUB:
        if folder:
            if _HUB_OWNER.fullmatch(path) is None:
                raise CheckpointError(
                    f"{_shown(text)}: expected hf://OWNER, without the name of an adapter or a revision"
                )
            return Address(HUB, path)
        found = _HUB_ID.fullmatch(path)
        if found is None:
            raise CheckpointError(f"{_shown(text)}: expected hf://owner/name or hf://owner/name@revision")
        return _hub(found, sha256)
    return Address(scheme, f"{scheme}://{path}", None, sha256)


def local_path(text: str) -> Path:
    """A path of this machine, which a `file://` URL may name, too."""
    if is_url(text):
        return Path(unquote(urlsplit(text).path))
    return Path(os.path.expanduser(text))  # noqa: PTH111  (pathlib's raises for users that do not exist)


def _hub(found: re.Match[str], sha256: str | None) -> Address:
    revision = found[2]
    if ".." in found[0] or (revision is not None and (revision.startswith("/") or "//" in revision)):
        raise CheckpointError(f"{printable(found[0])}: not a hub id with a revision", hint=EXPECTED)
    return Address(HUB, found[1], revision, sha256)


def _split_pin(text: str) -> tuple[str, str | None]:
    pinned = _PIN.fullmatch(text)
    if pinned is None:
        return text, None
    if not _SHA256.fullmatch(pinned[2]):
        raise CheckpointError(
            f"{_shown(pinned[1])}: expected 64 hexadecimal digits after @sha256:, got {printable(pinned[2], 80)!r}",
            hint="It is the sha256 of adapter_model.safetensors: sha256sum adapter_model.safetensors",
        )
    return pinned[1], pinned[2]


def _url_problem(url: str) -> str:
    """Why a URL cannot be an adapter's; empty where it can."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if "::" in url:
        return "a chain of file systems (::) is not opened"
    if scheme.lower() in ("file", "local"):
        return "" if url.startswith(("file:///", "local:///")) else "expected file:///absolute/path"
    if not is_printable(url) or "\\" in url or len(url) > _LONGEST:
        return f"a URL has at most {_LONGEST} characters, and no control characters or backslashes"
    if "?" in url or "#" in url:
        return (
            "a URL with a query (?) or a fragment (#) does not name a folder, and a signature in it would be in logs; "
            "give credentials in the environment"
        )
    if "@" in host and scheme.lower() not in (HUB, "abfs", "abfss", "az"):  # there it is container@account
        return "credentials in a URL would be in logs and in the list of models; give them in the environment"
    parts = [unquote(part) for part in path.rstrip("/").split("/")] if path.strip("/") else []
    if not host or any(part in ("", ".", "..") or "/" in part for part in parts):
        return "a path with empty parts, '.' or '..' in it"
    return ""


def _shown(text: str) -> str:
    """A URL without what may be a secret in it."""
    shown = re.sub(r"(://)[^/@]*@", r"\1...@", text)
    return printable(re.sub(r"[?#].*", "?...", shown, flags=re.DOTALL))
