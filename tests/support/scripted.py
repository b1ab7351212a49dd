"""A model for lm-eval that answers by script, and what tests read from lm-eval's results."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

from soka_serve.evaluation.harness import quiet_harness

# Warnings of lm-eval and of what it imports, not of ours.
OF_LM_EVAL = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning")
]


class ScriptedModel(LM):  # type: ignore[misc]
    """Answers what `answer` says for a document and the number of the sample."""

    def __init__(self, answer: Callable[[Mapping[str, Any], int], str]) -> None:
        super().__init__()
        self.answer = answer
        self.seen: dict[str, int] = {}
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            prompt, options = request.args
            number = self.seen.get(prompt, 0)
            self.seen[prompt] = number + 1
            self.prompts.append(prompt)
            text = self.answer(request.doc, number)
            for stop in options["until"]:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def evaluate(manager: Any, tasks: Sequence[str], answer: Callable[..., str], **more: Any) -> tuple[Any, ScriptedModel]:
    model = ScriptedModel(answer)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, log_samples=True, **more), model


def simple_evaluate(**options: Any) -> Any:
    """lm-eval's, as `soka-serve eval` calls it."""
    with quiet_harness():
        return lm_eval.simple_evaluate(bootstrap_iters=0, **options)


def metrics(found: Any, task: str) -> dict[str, float]:
    return {k: v for k, v in found["results"][task].items() if "," in k and "stderr" not in k}


def changed_digit(text: str) -> str:
    """The last digit of a text, one higher."""
    at = max(m.start() for m in re.finditer(r"\d", text))
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
