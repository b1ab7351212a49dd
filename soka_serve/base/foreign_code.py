"""Code that comes with a checkpoint (`auto_map` in its JSON files), found and refused before it is loaded.

A checkpoint may name Python classes of its own beside, or instead of, those of transformers. soka-serve never runs
them: a checkpoint that transformers has classes for is loaded with those, any other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from soka_serve.base.folder import ModelFolder
from soka_serve.errors import CheckpointError
from soka_serve.io.file_names import CONFIG_FILE

_HINT = (
    "soka-serve never runs code that comes with a checkpoint: take a checkpoint whose classes transformers has itself "
    "(a newer transformers may have them), or convert this one where you trust its code, and remove auto_map"
)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_DEEPEST = 4  # configs within configs
# Shown of one name in a message.
_LONGEST = 100


def check_no_code(folder: ModelFolder) -> None:
    """Refuse a checkpoint that transformers could only load by running the checkpoint's own code.

    Reads config.json and tokenizer_config.json only; what transformers has is read from its source files, since
    importing it takes seconds. `soka_serve.base.pretrained` refuses the same when it opens the checkpoint.

    Raises:
        CheckpointError: names the file, the classes in `auto_map` and what transformers lacks; all of it at once.
    """
    directory = folder.directory
    config, settings = folder.json("config.json"), folder.json("tokenizer_config.json")
    problems = []
    kind = config.get("model_type")
    models = _map_of(config)
    wanted = {name: code for name, code in models.items() if name in ("AutoConfig", "AutoModelForCausalLM")}
    if wanted and not _has_model(kind):
        what = f"transformers has no causal language model of its own for model_type {_short(kind)}"
        problems.append(f"{directory / 'config.json'}: auto_map names {_listed(wanted)}, and {what}")
    tokenizers = _map_of(settings)
    chosen = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if "AutoTokenizer" in tokenizers and not _has_tokenizer(kind, chosen):
        named = _listed({"AutoTokenizer": tokenizers["AutoTokenizer"]})
        what = f"transformers has no tokenizer_class {_short(chosen)} of its own"
        problems.append(f"{directory / 'tokenizer_config.json'}: auto_map names {named}, and {what}")
    # transformers would fetch a hub repository of that name, and import it
    for name, value in _kernels(config):
        problems.append(f"{directory / 'config.json'}: {name} {_short(value)} names code on a hub")
    if problems:
        raise CheckpointError("\n".join(problems), hint=_HINT)


def check_no_adapter(directory: Path) -> None:
    """Refuse a checkpoint with an adapter's config beside its own.

    transformers opens the model that the adapter names, which may lie anywhere, and adds the adapter; what is hashed
    and merged are the checkpoint's own files.

    Raises:
        CheckpointError: names the file.
    """
    file = directory / CONFIG_FILE
    if file.exists():
        raise CheckpointError(
            f"{file}: an adapter lies in the folder of the model; transformers would load the base that it names, with "
            "the adapter added, instead of the model",
            hint="move the adapter to a folder of its own",
        )


def _kernels(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Implementations that lie on a hub, of the model and of the parts that it has configs for, by dotted name."""
    for name, value in config.items():
        if name in _KERNELS and "/" in str(value):
            yield prefix + name, value
        elif name.endswith("_config") and isinstance(value, Mapping) and prefix.count(".") < _DEEPEST:
            yield from _kernels(value, f"{prefix}{name}.")


def _map_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`auto_map`: class of transformers -> 'module.Class' of the checkpoint. A list is a tokenizer's old spelling."""
    found = values.get("auto_map")
    if isinstance(found, Mapping):
        return {str(name): code for name, code in found.items() if code is not None}
    return {"AutoTokenizer": found} if found else {}


def _listed(classes: Mapping[str, Any]) -> str:
    return ", ".join(f"{_short(code)} as {name}" for name, code in classes.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _has_model(kind: object) -> bool:
    """Whether transformers has a config and a causal language model for a model type."""
    if not isinstance(kind, str):
        return False
    configs = transformers_source("auto_mappings.py") + transformers_source("configuration_auto.py")
    models = transformers_source("modeling_auto.py")
    causal = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES\b.*?^\)", models, re.M | re.S)
    return _has_key(configs, kind) and (causal is None or _has_key(causal[0], kind))


def _has_tokenizer(kind: object, name: object) -> bool:
    """Whether transformers has a tokenizer of that class name, or one for the model type."""
    source = transformers_source("tokenization_auto.py")
    table = re.search(r"^TOKENIZER_MAPPING_NAMES\b.*?^\)", source, re.M | re.S)
    if table is not None and isinstance(kind, str) and _has_key(table[0], kind):
        return True
    if not isinstance(name, str) or not name.isidentifier():
        return False
    plain = name.removesuffix("Fast")
    if re.search(rf'"{plain}(?:Fast)?"', source + transformers_source("__init__.py", auto=False)):
        return True
    pattern = re.compile(rf"^class {plain}(?:Fast)?\b", re.M)
    folder = _folder()
    files = [] if folder is None else sorted(folder.glob("**/tokenization_*.py"))
    return any(pattern.search(file.read_text(encoding="utf-8")) for file in files)


def _has_key(source: str, key: str) -> bool:
    """Whether `key` is a key of a mapping in Python source: ("key", …) or "key": …"""
    return re.search(rf'"{re.escape(key)}"\s*[,:]', source) is not None


@cache
def _folder() -> Path | None:
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def transformers_source(name: str, *, auto: bool = True) -> str:
    """A file of transformers, of its auto classes or at its top; '' where this version has none of that name."""
    folder = _folder()
    file = folder / "models" / "auto" / name if folder and auto else (folder or Path()) / name
    return file.read_text(encoding="utf-8") if folder and file.is_file() else ""
