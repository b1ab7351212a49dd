"""Rows of the benchmarks: from the hub, or from JSON Lines files in the folder `SOKA_EVAL_DATA`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.data.hub_rows import hub_rows
from soka_serve.data.rows import Row, jsonl_rows
from soka_serve.errors import DataError, EvalError
from soka_serve.manifest.schema import Data

DATA_VARIABLE = "SOKA_EVAL_DATA"


@dataclass(frozen=True)
class BenchmarkSplit:
    """One split of a benchmark: a file name, and the hub dataset that it is otherwise."""

    file: str
    hub: str
    split: str
    config: str | None = None


SOURCES = {
    "gsm8k/test": BenchmarkSplit("gsm8k_test.jsonl", "openai/gsm8k", "test", "main"),
    "gsm8k/train": BenchmarkSplit("gsm8k_train.jsonl", "openai/gsm8k", "train", "main"),
    "math_500/test": BenchmarkSplit("math_500.jsonl", "HuggingFaceH4/MATH-500", "test"),
    "mbpp/test": BenchmarkSplit("mbpp.jsonl", "google-research-datasets/mbpp", "test", "full"),
    "mbpp_sanitized/test": BenchmarkSplit("sanitized-mbpp.jsonl", "google-research-datasets/mbpp", "test", "sanitized"),
}

SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)
SOURCES |= {
    f"math_{name}/test": BenchmarkSplit(f"math_{name}.jsonl", "EleutherAI/hendrycks_math", "test", name)
    for name in SUBJECTS
}


def read_rows(name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a split, with at least these columns.

    Args:
        name: a key of `SOURCES`.
        columns: columns that the task needs; a row without one is an error.

    Raises:
        EvalError: a file that is not there or malformed, a hub that cannot be reached, a row without a column.
    """
    source = SOURCES[name]
    folder = os.environ.get(DATA_VARIABLE, "")
    try:
        rows = list(_local_rows(Path(folder), source) if folder else _hub_rows(source))
    except DataError as error:
        hint = f"Set {DATA_VARIABLE} to a folder with {source.file}, or let the hub be reached (HF_HUB_OFFLINE=0)."
        if folder:
            hint = f"{DATA_VARIABLE} is set, so the hub is not asked; unset it, or put {source.file} there."
        raise EvalError(error.message, hint=hint) from None
    for where, row in rows:
        missing = [column for column in columns if column not in row]
        if missing:
            raise EvalError(
                f"{where}: no column {', '.join(missing)}; it has {', '.join(sorted(row))}",
                hint=f"{name} needs the columns {', '.join(columns)}.",
            )
    return [dict(row) for _, row in rows]


def _local_rows(folder: Path, source: BenchmarkSplit) -> Iterable[tuple[str, Row]]:
    if not folder.is_dir():
        raise DataError(f"{DATA_VARIABLE} = {folder}: not a folder")
    return jsonl_rows(folder / source.file, None)


def _hub_rows(source: BenchmarkSplit) -> Iterable[tuple[str, Row]]:
    keys = {"hub": source.hub, "config": source.config}
    data = Data.model_validate({key: value for key, value in keys.items() if value is not None})
    return hub_rows(data, source.split, Path(), stream=False)


def as_dataset(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as lm-eval's `custom_dataset` returns them: a mapping of split to dataset."""
    import datasets

    return {"test": datasets.Dataset.from_list(list(rows))}
