"""MBPP: programs that the model writes, run against the problem's asserts in the sandbox.

Loading a task asks for consent and tries the sandbox: without either nothing is generated.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from soka_serve.evaluation.answer_code import defined_names, extract_code, parse
from soka_serve.evaluation.prompts import zero_shot_prompt
from soka_serve.evaluation.sandbox import check_sandbox, require_consent, run_programs
from soka_serve.evaluation.sandbox.runner import Program
from soka_serve.evaluation.sources import as_dataset, read_rows

_TEST_IDS = range(11, 511)
"""MBPP's test split: 1-10 are for prompts, 511 and up for validation and training."""


def load(**_: Any) -> dict[str, Any]:
    """The 500 test problems.

    Raises:
        SandboxError: no consent to run what the model writes, or a protection is missing.
    """
    return _load("mbpp/test", ("text", "code", "task_id", "test_setup_code", "test_list"))


def load_sanitized(**_: Any) -> dict[str, Any]:
    """The test problems of the sanitized subset; errors as `load`."""
    return _load("mbpp_sanitized/test", ("prompt", "code", "task_id", "test_imports", "test_list"))


def _load(name: str, columns: Sequence[str]) -> dict[str, Any]:
    require_consent()
    check_sandbox()
    rows = [row for row in read_rows(name, columns) if row["task_id"] in _TEST_IDS]
    return as_dataset([{column: row[column] for column in columns} for row in rows])


def prompt(doc: Mapping[str, Any]) -> str:
    """The problem with its tests, in the format that the adapter was trained on."""
    description = doc["text"] if "text" in doc else doc["prompt"]
    question = f"{description}\nYour code should pass these tests:\n" + "\n".join(doc["test_list"])
    own = ("text", "prompt", "task_id", "test_list", "test_setup_code", "test_imports")
    columns = {name: doc[name] for name in own if name in doc}
    return zero_shot_prompt("mbpp", question, {"text": description, **columns})  # sanitized rows have no `text`


def fewshot_prompt(doc: Mapping[str, Any]) -> str:
    """The harness's own prompt of mbpp."""
    tests = "\n".join(doc["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {doc['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def fewshot_target(doc: Mapping[str, Any]) -> str:
    """The program, as the harness's own mbpp shows it in a shot."""
    return f"{doc['code']}\n[DONE]"


def fewshot_samples() -> list[dict[str, Any]]:
    """The three problems that the harness's own mbpp shows: task_id 2, 3, 4."""
    return [
        {
            "task_id": 2,
            "text": "Write a function to find the similar elements from the given two tuple lists.",
            "code": "def similar_elements(test_tup1, test_tup2):\r\n"
            "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
            "test_list": [
                "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
                "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
                "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",
            ],
        },
        {
            "task_id": 3,
            "text": "Write a python function to identify non-prime numbers.",
            "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
            "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n"
            "            result = True\r\n    return result",
            "test_list": [
                "assert is_not_prime(2) == False",
                "assert is_not_prime(10) == True",
                "assert is_not_prime(35) == True",
            ],
        },
        {
            "task_id": 4,
            "text": "Write a function to find the largest integers from a given list of numbers using heap queue "
            "algorithm.",
            "code": "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
            "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
            "test_list": [
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
                "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
            ],
        },
    ]


def program_of(doc: Mapping[str, Any], code: str) -> Program:
    """A program with the problem's tests.

    The tests take from the program only the names that the reference program defines (one problem asks for a function
    called `sum`), and modules from where the reference program imports them.
    """
    imports: list[str] = []
    tree = parse(doc["code"].replace("\r\n", "\n"))
    for statement in tree.body if tree else ():
        match statement:
            case ast.Import(names=modules):
                known = [m for m in modules if m.name.partition(".")[0] in sys.stdlib_module_names]
                imports += [ast.unparse(ast.Import(names=[module])) for module in known]
            case ast.ImportFrom(module=str() as module) if module.partition(".")[0] in sys.stdlib_module_names:
                imports.append(ast.unparse(statement))
    setup = "\n".join([*imports, *doc.get("test_imports", ()), doc.get("test_setup_code", "") or ""])
    return Program(code, tuple(doc["test_list"]), setup.replace("\r\n", "\n"), _reference_names(doc))


def _reference_names(doc: Mapping[str, Any]) -> tuple[str, ...]:
    """What the reference program defines, its imports left out."""
    tree = parse(doc["code"].replace("\r\n", "\n"))
    if tree is None:
        return ()
    tree.body = [statement for statement in tree.body if not isinstance(statement, ast.Import | ast.ImportFrom)]
    return tuple(defined_names(tree))


def _wanted_names(doc: Mapping[str, Any]) -> set[str]:
    """What the tests take from a program: of the reference program's names those that they use."""
    trees = [tree for test in doc["test_list"] if (tree := parse(test))]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return used & set(_reference_names(doc))


def run_answers(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """lm-eval filter: each answer's program run against its problem's tests."""
    require_consent()
    codes = []
    for texts, doc in zip(resps, docs, strict=True):
        names, asked = _wanted_names(doc), prompt(doc)
        codes.append([extract_code(text, names=names, prompt=asked) for text in texts])
    return _run(codes, docs)


def run_completions(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """lm-eval filter: the same, each text being the program as it stands, as the harness's own mbpp takes it."""
    return _run([[text.partition("[DONE]")[0] for text in texts] for texts in resps], docs)


def _run(codes: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    require_consent()
    programs = [program_of(doc, code) for doc, several in zip(docs, codes, strict=True) for code in several]
    verdicts = iter(run_programs(programs, allow_code_execution=True))
    return [
        [{"code": code, "passed": (verdict := next(verdicts)).passed, "reason": verdict.reason} for code in several]
        for several in codes
    ]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k samples drawn from these is right: the unbiased estimator of arXiv:2107.03374, section 2.1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), round(pass_at_k(4, 2, 2), 4)
    (0.25, 1.0, 0.8333)

    Raises:
        ValueError: fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; there are {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def score(doc: Mapping[str, Any], results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """pass@1."""
    verdicts = results[0]
    return {"pass_at_1": pass_at_k(len(verdicts), sum(v["passed"] for v in verdicts), 1)}


def score_at_10(doc: Mapping[str, Any], results: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """pass@1 and pass@10 of the samples, and the share of problems whose samples are not all the same text."""
    verdicts = results[0]
    correct = sum(v["passed"] for v in verdicts)
    return {
        **{f"pass_at_{k}": pass_at_k(len(verdicts), correct, k) for k in (1, 10)},
        "varied": float(len({v["code"] for v in verdicts}) > 1),
    }
