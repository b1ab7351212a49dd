"""Zero-shot prompts: rendered from the manifest's own template, by the code that renders training examples.

`SOKA_EVAL_MANIFEST` names the manifest that the adapter was trained by. Without it each benchmark is asked as the
manifest that ships for it (`manifests/gsm8k.toml`, `manifests/llama2-7b/{math,mbpp}.toml`) would train it.

Training and test sets call the question differently. A row offers it under every name in `QUESTION_COLUMNS`; a
column that the benchmark has itself keeps the benchmark's value, so that a manifest that trains on the benchmark's own
training split renders its test split the same way. Columns that hold the answer are never offered.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from soka_serve.base.resolve import resolve_base
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.data.examples import render_prompt
from soka_serve.errors import DataError, EvalError
from soka_serve.manifest.read import LoadedManifest, read_manifest
from soka_serve.manifest.schema import Data

logger = logging.getLogger(__name__)

MANIFEST_VARIABLE = "SOKA_EVAL_MANIFEST"

QUESTION_COLUMNS = ("question", "query", "problem", "text", "instruction", "prompt")
"""Names that training sets give the question: GSM8K, MetaMathQA and CodeFeedback, MATH, MBPP, Alpaca and its kin."""

_ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ query }}

### Response:"""

SHIPPED_PROMPTS: Mapping[str, tuple[str, str]] = {
    "gsm8k": ("gsm8k.toml", "Question: {{ question }}\nAnswer:"),
    "math": ("llama2-7b/math.toml", _ALPACA),
    "mbpp": ("llama2-7b/mbpp.toml", _ALPACA),
    "builtin": ("math.toml", "{{ prompt }}"),
}
"""Per benchmark the manifest that ships for it, and its template: manifests are not in wheels. A test compares them."""


_chats: set[str] = set()


def is_chat(prompt: str) -> bool:
    """Whether a prompt is a rendered chat: it brings its own special tokens, or has none, and gets none in front."""
    return prompt in _chats


def zero_shot_prompt(benchmark: str, question: str, columns: Mapping[str, Any]) -> str:
    """The prompt of one test problem.

    Args:
        benchmark: 'gsm8k', 'math', 'mbpp' or 'builtin'.
        question: the whole question, as an instruction-tuning set would ask it.
        columns: the benchmark's own columns that a prompt may use; they win over `question`.

    Raises:
        EvalError: the template uses a column that is not there, or the manifest's prompts cannot be rendered here.
        ManifestError: the manifest is wrong.
    """
    place = os.environ.get(MANIFEST_VARIABLE, "")
    try:
        if not place:
            row = _offered(question, columns)
            return render_prompt(_shipped(benchmark), row, f"{benchmark}, as in {SHIPPED_PROMPTS[benchmark][0]}")
        data, tokenizer = _trained_on(place)
        if data.builtin is not None and benchmark != "builtin":
            raise EvalError(
                f"{place}: train.data.builtin = '{data.builtin}' has no prompt template for {benchmark}: its prompts "
                "come whole from the generator",
                hint=f"Measure it with soka_builtin_*, or name another manifest in {MANIFEST_VARIABLE}.",
            )
        if data.messages is not None:
            # What training had as a system message is not known here; the question is the user's turn.
            row = {data.messages: [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]}
        elif benchmark == "builtin":
            row = dict(columns)
        else:
            row = _offered(question, columns)
        prompt = render_prompt(data, row, f"{place}: {benchmark}", tokenizer)
        if data.messages is not None:
            _chats.add(prompt)
        return prompt
    except DataError as error:
        raise EvalError(
            error.message, hint=f"A prompt for {benchmark} may use the columns above. {error.hint or ''}".strip()
        ) from None


def _offered(question: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(QUESTION_COLUMNS, question), **columns}


@cache
def _shipped(benchmark: str) -> Data:
    file, template = SHIPPED_PROMPTS[benchmark]
    logger.warning("%s: prompts are those of %s; %s names another manifest", benchmark, file, MANIFEST_VARIABLE)
    return Data.model_validate({"jsonl": "unused", "prompt": template})


@cache
def _trained_on(place: str) -> tuple[Data, TextTokenizer | None]:
    loaded = read_manifest(Path(place))
    data, *others = loaded.manifest.train.datasets
    logger.info("prompts are those of %s%s", place, ", train.data[0]" if others else "")
    return data, _tokenizer(loaded) if data.messages is not None else None


def _tokenizer(loaded: LoadedManifest) -> TextTokenizer:
    return resolve_base(loaded.manifest.base, manifest_dir=loaded.directory, weights=False).tokenizer
