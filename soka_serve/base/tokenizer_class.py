"""Which class transformers opens a checkpoint's tokenizer with, as far as its files tell.

transformers does not always read tokenizer.json as it stands: a class may rebuild normaliser and pre-tokenizer from
scratch, add tokens that only the files beside it name, or take another class for a model type or a hub id.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from soka_serve.base.folder import ModelFolder
from soka_serve.base.foreign_code import transformers_source
from soka_serve.base.tokenizer import SPECIAL_NAMES
from soka_serve.errors import CheckpointError
from soka_serve.io.files import read_errors, replace_directory, require_regular
from soka_serve.io.own_cache import own_folder

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# Files that are not only checked, but read here later.
_READ_HERE = ("tokenizer.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
# The class that takes tokenizer.json as it stands, under its two names.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Files beside it that add to it.
_MORE = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
# Settings that do not change a token.
_HARMLESS = {
    *SPECIAL_NAMES,
    *("added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local"),
    *("local_files_only", "model_input_names", "model_max_length", "name_or_path", "padding_side", "tokenizer_class"),
}

# What a class may read, beside config.json.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


def check_tokenizer_files(folder: ModelFolder) -> None:
    """Refuse files that a class may read and that are none, or of a size that nothing good has, before they are read.

    Raises:
        CheckpointError: names the file.
    """
    directory = folder.directory
    for file in sorted(directory.iterdir()) + sorted(directory.glob("additional_chat_templates/*")):
        name = str(file.relative_to(directory))
        if file.suffix not in _SUFFIXES or file.is_dir():
            continue
        if name in _READ_HERE:
            folder.content(name)
        else:
            folder.check(name)
    settings = directory / "tokenizer_config.json"
    named = folder.json(settings.name).get("fast_tokenizer_files")
    if named is not None and named != ["tokenizer.json"]:
        raise CheckpointError(
            f"{settings}: fast_tokenizer_files {named!r:.200}: transformers would read one of these instead of "
            "tokenizer.json, by its version",
            hint="take fast_tokenizer_files out",
        )


def reads_plainly(folder: ModelFolder) -> bool:
    """Whether transformers is sure to take tokenizer.json as it stands; False where only opening it can tell."""
    settings = folder.json("tokenizer_config.json")
    if settings.get("tokenizer_class") not in _GENERIC or not settings.keys() <= _HARMLESS:
        return False
    config = folder.json("config.json")
    replaced = _listed("MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS")
    if replaced is None or {str(config.get("model_type")), str(config.get("model_name"))} & replaced:
        return False
    several = isinstance(settings.get("chat_template"), list | dict)
    if several or any((folder.directory / name).exists() for name in _MORE):
        return False
    added = folder.backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    named = [settings[name] for name in SPECIAL_NAMES if settings.get(name) is not None]
    if any(not isinstance(token, str) or token not in special for token in named):
        return False
    said = settings.get("added_tokens_decoder")
    if said is None:
        return True
    known = {str(number): _attributes(token) for number, token in added.items()}
    return isinstance(said, dict) and said == known


def tokenizer_directory(folder: ModelFolder, hub: str | None) -> Path:
    """Where a base's tokenizer is opened, so that training, evaluation and servers all get the same one.

    transformers takes another class for some hub ids than their files name, and only when it is given the id: a server
    that is given the snapshot's directory would not. For these it is a folder with the base's files in which
    tokenizer_config.json names that class; for all others it is the base's own directory.

    Args:
        folder: of the base.
        hub: its hub id; None for a base that is not from the hub.

    Raises:
        CheckpointError: a file of the base that cannot be read.
        BuildError: the folder cannot be written.
    """
    directory, settings = folder.directory, hub_settings(folder, hub)
    if settings is None:
        return directory
    contents = {name: _content(directory / name) for name in ("config.json", *TOKENIZER_FILES)}
    contents["tokenizer_config.json"] = settings
    made = own_folder() / "tokenizers" / hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    if any(_content(made / name) != content for name, content in contents.items()):
        with replace_directory(made) as new:
            for name, content in contents.items():
                if content is not None:
                    (new / name).write_bytes(content)
    return made


def hub_settings(folder: ModelFolder, hub: str | None) -> bytes | None:
    """What tokenizer_config.json must say for a base to be opened as by its hub id; None: what it says.

    Args:
        folder: of the base.
        hub: its hub id, if it has one.
    """
    patterns = _listed("MODEL_IDS_TO_TOKENIZERS_BACKEND") or ()
    if hub is None or not any(fnmatch(hub.lower(), pattern) for pattern in patterns):
        return None
    settings = folder.json("tokenizer_config.json")
    if "auto_map" in settings or settings.get("tokenizer_class") in _GENERIC:
        return None
    return (json.dumps({**settings, "tokenizer_class": _GENERIC[0]}, indent=2) + "\n").encode()


def _content(file: Path) -> bytes | None:
    if not file.exists():
        return None
    with read_errors(file):
        return require_regular(file).read_bytes()


def _attributes(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _listed(name: str) -> set[str] | None:
    """A list of names in the source of transformers' AutoTokenizer; None where this version has none."""
    source = transformers_source("tokenization_auto.py")
    found = re.search(rf"^{name}\b[^=\n]*= ([\[{{].*?^[\]}}])", source, re.M | re.S)
    return None if found is None else set(ast.literal_eval(found[1]))
