"""What lies beside the weights of a merged model: config, tokenizer, licence, soka.lock and a model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from soka_serve.adapter.source import AdapterSource
from soka_serve.adapter.weighted import weighted_lock, weighted_table
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import INDEX_FILE, SINGLE_FILE
from soka_serve.base.tokenizer_class import hub_settings
from soka_serve.errors import CheckpointError, printable
from soka_serve.io.file_names import CARD_FILE, LOCK_FILE
from soka_serve.io.files import read_errors, require_regular, write_text_atomic
from soka_serve.io.json_files import read_json
from soka_serve.io.lockfile import write_lock
from soka_serve.io.outputs import OutputKind
from soka_serve.io.versions import versions

log = logging.getLogger(__name__)

_DTYPE_KEYS = ("dtype", "torch_dtype")

LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")

# What belongs to a model beside its weights and config. Everything else in the base's directory stays there.
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", *LICENCES),
)


def model_files(directory: Path) -> list[str]:
    """Every file that a merged model in a directory may consist of: those that its index names, and fixed names."""
    shards: list[str] = []
    try:
        named = read_json(directory / INDEX_FILE).get("weight_map") if (directory / INDEX_FILE).is_file() else None
        shards = [escape(str(name)) for name in named.values() if _is_shard(name)] if isinstance(named, dict) else []
    except CheckpointError:  # a damaged index names nothing: what it named is then in the way, and stays
        pass
    return [*shards, SINGLE_FILE, INDEX_FILE, "config.json", CARD_FILE, LOCK_FILE, *_COPIED]


def _is_shard(name: object) -> bool:
    """Whether a merge can have written a file that an index names: it also names what somebody put into it."""
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name


MERGED = OutputKind(
    what="a merged model",
    is_marked=lambda lock: lock is not None and lock.get("kind") == "merged",
    files=lambda directory, _: model_files(directory),
)


def copy_side_files(base: Base, new: Path, dtype: str | None, base_name: str | None = None) -> list[str]:
    """Config, tokenizer, generation config and licence of the base; returns the names of what was written.

    Args:
        base: the base.
        new: the merged model's folder.
        dtype: what config.json shall say the weights are; None leaves it as it is.
        base_name: what adapters call the base. For some hub ids transformers takes another tokenizer class than the
            files name; the merged model has no hub id, so its tokenizer_config.json names that class.
    """
    directory = base.directory
    copied = []
    for pattern in _COPIED:
        for file in sorted(directory.glob(pattern)):
            target = new / file.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            _copy(file, target)
            copied.append(str(file.relative_to(directory)))
    if (settings := hub_settings(base.folder, base_name)) is not None:
        (new / "tokenizer_config.json").write_bytes(settings)
    if dtype is not None:
        text = json.dumps(_with_dtype(base.config, dtype), indent=2) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")
    else:
        _copy(directory / "config.json", new / "config.json")
    weights = {f.name for f in base.checkpoint.files}
    files = [f.name for f in sorted(directory.iterdir()) if f.is_file()]
    left = [name for name in files if name not in weights and not (new / name).exists()]
    if left:
        log.info("merge: not copied from the base: %s", ", ".join(left))
    return [*copied, "config.json"]


def _copy(source: Path, target: Path) -> None:
    """Copy a small file of the base; an error says which of the two could not be read or written."""
    with read_errors(source):
        content = require_regular(source).read_bytes()
    target.write_bytes(content)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every dtype key set, in nested configs too; one is added where there is none."""

    def change(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: change(value)
            if isinstance(value, dict)
            else dtype
            if key in _DTYPE_KEYS and value is not None
            else value
            for key, value in part.items()
        }

    changed = change(config)
    return changed if any(key in changed for key in _DTYPE_KEYS) else {**changed, "dtype": dtype}


def write_papers(
    new: Path, directory: Path, sources: Sequence[tuple[AdapterSource, float]], dtype: str, base_sha256: str | None
) -> None:
    """soka.lock and a short model card, without paths of this machine."""
    base = sources[0][0].adapter.base_model or ""
    if not base or Path(base).is_absolute():  # where it lay on some machine is nobody's business
        base = Path(base or directory).name
    base, quantize = printable(base), sources[0][0].adapter.quantize
    lock = {
        "soka": 1,
        "kind": "merged",
        "dtype": dtype,
        "base": {"name": base, **({"sha256": base_sha256} if base_sha256 else {})},
        **({} if quantize is None else {"quantize": quantize}),
        "adapters": weighted_lock(sources),
        "versions": versions(),
    }
    write_lock(new / LOCK_FILE, lock)
    held = f" W is rounded to {quantize} by bitsandbytes and back: the adapter adds to that." if quantize else ""
    card = (
        "---\nlibrary_name: transformers\ntags: [soka, merged]\n---\n\n"
        f"# {base} with {len(sources)} SoKA adapter{'s' * (len(sources) > 1)} merged in\n\n"
        f"Dense weights: W + sum of weight x delta, rounded once.{held} Loads like the base model.\n\n"
        f"{weighted_table(sources)}\n\n"
        "`soka.lock` holds the hashes and versions.\n"
    )
    write_text_atomic(new / CARD_FILE, card)
