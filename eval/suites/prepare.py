"""Write the data that the suites on a real model read: GSM8K, MBPP by task, and plain English, as JSON Lines.

    python -m eval.suites.prepare --gsm8k train.jsonl test.jsonl --mbpp mbpp.jsonl --base MODEL --out DATA

GSM8K's files are those of openai/grade-school-math, MBPP's is google-research's `mbpp.jsonl`. `soka-serve compare
SUITE --root DATA` then finds everything, the base by a link. GSM8K's training file is also there in two parts, of
which nothing chose anything: rows 1 to 5,000 (`gsm8k_early`) and 5,001 to 6,900 (`gsm8k_late`); the validation
problems of suites that take the last 100 short ones lie behind. MBPP is split as its paper says: tasks 601 to 974
train, 11 to 510 test; training tasks whose description stands in the test too are left out. The English is prose of
the reference documentation that is part of CPython (`pydoc_data.topics`): paragraphs of 200 to 450 characters, in the
order of their hashes. Another text: `--english FILE`, with a paragraph per line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from soka_serve.io.files import write_text_atomic

LATE = 5000, 6900  # rows of GSM8K's training file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--mbpp", type=Path, required=True, metavar="FILE")
    parser.add_argument("--base", type=Path, required=True, metavar="MODEL", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--english", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DATA")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    train, test = split_mbpp(read_rows(given.mbpp))
    text = given.english.read_text().splitlines() if given.english else reference_prose()
    gsm8k = read_rows(given.gsm8k[0])
    files = {
        "gsm8k_train": gsm8k,
        "gsm8k_early": gsm8k[: LATE[0]],
        "gsm8k_late": gsm8k[slice(*LATE)],
        "gsm8k_test": read_rows(given.gsm8k[1]),
        "mbpp_train": train,
        "mbpp_test": test,
        "english": [{"text": paragraph} for paragraph in text if paragraph.strip()],
    }
    for name, rows in files.items():
        write_text_atomic(given.out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows)} rows")
    link = given.out / "smollm2"
    if not link.exists():
        link.symlink_to(given.base.resolve())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def split_mbpp(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test tasks, with Unix line ends; no description is in both."""
    tasks = [row | {"code": row["code"].replace("\r\n", "\n")} for row in rows]
    test = [row for row in tasks if 11 <= row["task_id"] <= 510]
    described = {row["text"] for row in test}
    train = [row for row in tasks if 601 <= row["task_id"] <= 974 and row["text"] not in described]
    return train, test


def reference_prose() -> list[str]:
    """Paragraphs of CPython's reference documentation that are prose: no list, example, grammar or heading."""
    found = {
        " ".join(paragraph.split())
        for text in topics.values()
        for paragraph in text.split("\n\n")
        if paragraph[:1].isalpha() and paragraph.rstrip().endswith(".")
    }
    kept = [paragraph for paragraph in found if 200 <= len(paragraph) <= 450]
    return sorted(kept, key=lambda paragraph: hashlib.sha256(paragraph.encode()).hexdigest())


if __name__ == "__main__":
    main()
