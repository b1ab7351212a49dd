"""Programs are found in answers, however a model dresses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from soka_serve.evaluation import mbpp
from soka_serve.evaluation.answer_code import extract_code

F = "def f(x):\n    return x + 1"
WRONG = "def g(x):\n    return x"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f():\n    return 1", "def f():\n    return 1"),
        (" def f():\n    return 1", "def f():\n    return 1"),
        ("Sure:\n```python\nimport re\n\ndef f(): pass\n```\nand\n```\nother\n```", "import re\n\ndef f(): pass"),
        ("```\ndef f(): pass", "def f(): pass"),
        ("def f():\n    return 1\n\nThis is how it works.", "def f():\n    return 1\n"),
        ("nothing", "nothing"),
        ("M = 5\ndef f():\n    return M", "M = 5\ndef f():\n    return M"),
        ("Here you are:\nM = 5\ndef f():\n    return M\nEnjoy it.", "M = 5\ndef f():\n    return M"),
    ],
)
def test_code_is_found(text: str, code: str) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    "text",
    [
        F,
        f"```python\n{F}\n```",
        f"~~~~py\n{F}\n~~~~\nDone.",
        f"{F}\n```",
        f"{F}\n```\n\nThis function returns the result.",
        f"{F}\n```\n\nExample:\n```python\nprint(1)\n```",
        f"The tests:\n```python\nassert f(1) == 2\n```\n```python\n{F}\n```",
        f"Run this first:\n```bash\npip install numpy\n```\nThen:\n```python\n{F}\n```",
        f"In Java:\n```java\nint f(int x) {{ return x + 1; }}\n```\nIn Python:\n```\n{F}\n```",
        "1. Write it:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done.",
        "1. ```python\n   def f(x):\n       return x + 1\n   ```",
        "> ```python\n> def f(x):\n>     return x + 1\n> ```",
        f"First try:\n```python\n{WRONG}\n```\nThe asked one:\n```python\n{F}\n```",
        f"```python title='a.py'\n{F}\n```",
        f"Wrong syntax:\n```python\ndef f(x) return\n```\nRight:\n```python\n{F}\n```",
        f"````markdown\n```\nno code\n```\n````\n```python\n{F}\n```",
    ],
)
def test_a_right_program_is_found_in_every_dress(text: str) -> None:
    assert defined(text, "f")["f"](1) == 2


def defined(text: str, *names: str, prompt: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(extract_code(text, names=names, prompt=prompt), found)
    return found


def test_blocks_that_need_each_other_are_put_together() -> None:
    text = f"A helper:\n```python\n{WRONG}\n```\nand\n```python\nfrom math import floor\n{F}\n```"
    assert {"f", "g"} <= defined(text, "f", "g").keys()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Write f.\n```python\n", f"{F}\n```\nIt adds one."),
        ("Write f.\n```python", f"\n{F}\n```"),
        ("Write f.\n```python\ndef f(x):\n", "    return x + 1\n```\nDone."),
        ("Write f.\n```python\ndef f(x):\n", "    return x + 1"),
        ("Write f.\n```python\ndef f(x):\n    return", " x + 1\n```"),
        ("Write f.\n```python\ndef f(x):\n", f"Sure:\n```python\n{F}\n```"),
        ("Like this:\n```python\nassert f(1) == 2\n```\nWrite f.", f"```python\n{F}\n```"),
    ],
)
def test_what_the_prompt_leaves_open_is_known(prompt: str, answer: str) -> None:
    assert defined(answer, "f", prompt=prompt)["f"](1) == 2


def test_reference_programs_pass_in_every_dress(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty of MBPP's own, through the filter of the task; and the same with another name does not pass."""
    monkeypatch.setenv("SOKA_EVAL_DATA", str(shared_data))
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    docs = mbpp.load()["test"].select(range(20))
    dresses = ("{}\n```\n\nThis function returns it.", "```python\nassert True\n```\n```python\n{}\n```")
    answers = [[dress.format(doc["code"].replace("\r\n", "\n")) for dress in dresses] for doc in docs]
    assert all(verdict["passed"] for verdicts in mbpp.run_answers(answers, list(docs)) for verdict in verdicts)
    renamed = [[text.replace("def ", "def another_") for text in texts] for texts in answers]
    assert not any(verdict["passed"] for verdicts in mbpp.run_answers(renamed, list(docs)) for verdict in verdicts)
