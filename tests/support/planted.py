"""Checkpoints with Python code of their own, which leaves a mark when it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from soka_serve.builtin import base_directory

CODE = """\
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class PlantedConfig(LlamaConfig):
    model_type = "planted"
class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig
class PlantedTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL = {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedForCausalLM"}
TOKENIZER = {"AutoTokenizer": ["planted.PlantedTokenizer", "planted.PlantedTokenizer"]}


def plant(directory: Path, mark: Path, *, model: bool = True, tokenizer: bool = True, native: bool = False) -> Path:
    """Make the embedded model in `directory` one that names code of its own; the code works, and writes `mark`.

    Args:
        directory: a copy of the embedded model is put there, unless one is there already.
        mark: written when the code runs.
        model, tokenizer: whether config.json and tokenizer_config.json name it.
        native: keep the types that transformers has classes of its own for.
    """
    if not directory.exists():
        shutil.copytree(base_directory(), directory)
    (directory / "planted.py").write_text(CODE.format(mark=str(mark)))
    if model:
        _update(directory / "config.json", {"auto_map": MODEL} | ({} if native else {"model_type": "planted"}))
    if tokenizer:
        kind = {} if native else {"tokenizer_class": "PlantedTokenizer"}
        _update(directory / "tokenizer_config.json", {"auto_map": TOKENIZER} | kind)
    return directory


def _update(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
