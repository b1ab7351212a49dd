"""Where adapters may come from: names in a folder of builds, and the folders of runtime loads.

Names and paths are what any client sends: nothing but an adapter inside the folders may be reached by them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from soka_serve.adapter.remote.fetch import local_adapter
from soka_serve.errors import printable
from soka_serve.io.file_names import CONFIG_FILE
from soka_vllm.folders import lies_in, opened, renamed
from soka_vllm.settings import ROOTS_VARIABLE

_LONGEST_REASON = 4000  # characters of why an adapter is refused
# In front of folders in a request's base_model_name, which only the API process uses.
_LIMITED = "soka-roots:"
# One component of a path that is not hidden; the same as the names of builds.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_build_name(name: str) -> bool:
    """Whether a name can be that of a build: one component of a path, not hidden."""
    return _NAME.fullmatch(name) is not None


def find_build(folder: Path, name: str) -> Path | None:
    """The adapter of a name in a folder of builds; None where there is none, or where the name leads out of the folder.

    Args:
        folder: the folder.
        name: what a client asked for, so anything.
    """
    if not is_build_name(name):
        return None
    for place in (folder / name / "adapter", folder / name):
        if (place / CONFIG_FILE).is_file():
            return place if lies_in(place, [folder]) else None
    return None


def allowed_roots() -> list[Path] | None:
    """The folders of SOKA_ADAPTER_ROOTS; None where it is not set, that is where everything is allowed."""
    text = os.environ.get(ROOTS_VARIABLE)
    return None if text is None else [Path(part).expanduser() for part in text.split(os.pathsep) if part]


def limited(lora_request: Any, roots: Sequence[Path] | None) -> Any:
    """A vLLM LoRARequest that carries to engine and workers where the adapter must lie; None: anywhere.

    A copy, for the process that reads: what the API shows stays as it is.
    """
    if roots is None:
        return lora_request
    told = _LIMITED + json.dumps([str(root.absolute()) for root in roots])
    return msgspec.structs.replace(lora_request, base_model_name=told)


def roots_of(lora_request: Any) -> list[Path] | None:
    """The folders that `limited` put into a request."""
    told = getattr(lora_request, "base_model_name", None) or ""
    return [Path(root) for root in json.loads(told.removeprefix(_LIMITED))] if told.startswith(_LIMITED) else None


def adapter_directory(path: str, roots: Sequence[Path] | None) -> Path:
    """Where an adapter's files are; hub ids and URLs are fetched, but not for those who may load from `roots` only.

    A server has fetched them before it asks; they come here from programs that call vLLM themselves.
    """
    if roots is None and not os.path.isabs(path):  # noqa: PTH117
        return local_adapter(path).absolute()
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (pathlib's raises for users that do not exist)


@contextmanager
def adapter_files(lora_request: Any) -> Iterator[Path]:
    """A directory with the files of an adapter that is to be loaded, opened and held to where they may lie.

    Raises:
        ValueError: whatever goes wrong within, as a message that names the adapter's own path and that a terminal may
            show.
    """
    roots = roots_of(lora_request)
    with opened(adapter_directory(lora_request.lora_path, roots), roots) as files:
        try:
            yield files
        except Exception as error:
            text = renamed(str(error) or type(error).__name__, files, lora_request.lora_path)
            raise ValueError(printable(text, _LONGEST_REASON, keep="\n")) from error


def are_equal(stock: Any, one: Any, other: object) -> bool:
    """LoRARequest.__eq__: adapters of one name and different ids are two.

    To vLLM they are equal, and a step collects the adapters of its requests in a set. An adapter that is unloaded and
    loaded again gets another id: with a request of before still running, a step had both ids and activated one, and the
    engine ended with a KeyError (up to 0.33, LoRA too).
    """
    return bool(stock(one, other)) and one.lora_int_id == getattr(other, "lora_int_id", None)


class Locks(WeakValueDictionary[str, asyncio.Lock]):
    """A lock for each name, as long as somebody holds it or waits for it."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())
