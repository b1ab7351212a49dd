"""lm-eval as `soka-serve eval` runs it: installed, quiet, with our tasks and what they read from the environment."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partialmethod
from importlib.util import find_spec
from typing import Any

from soka_serve.errors import EvalError, install_extra
from soka_serve.evaluation.prompts import MANIFEST_VARIABLE
from soka_serve.evaluation.subject import Evaluation
from soka_serve.evaluation.tasks import lm_eval_manager, own_task_names
from soka_serve.io.scoped import scoped_environment

logger = logging.getLogger(__name__)


def check_installed() -> None:
    """Raise EvalError where lm-eval or what our tasks need of it is not installed."""
    missing = [name for name in ("lm_eval", "tenacity", "math_verify") if find_spec(name) is None]
    if missing:
        raise EvalError(
            f"lm-eval is not installed as it is needed here: no {', '.join(missing)}",
            hint=install_extra("eval"),
        )


def task_environment(evaluation: Evaluation) -> AbstractContextManager[None]:
    """Set the environment that the tasks read: the manifest whose prompt template they render, and the consent."""
    values = {MANIFEST_VARIABLE: str(evaluation.loaded.path.resolve())}
    if evaluation.allow_code_execution:
        # The harness's own tasks ask for the second one.
        values |= {"SOKA_ALLOW_CODE_EXECUTION": "1", "HF_ALLOW_CODE_EVAL": "1"}
    return scoped_environment(values)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without what lm-eval says of its own insides, and without its asking git for the commit of the user's folder,
    which it would take for its own, and pip for what is installed, which takes a second for each part and is kept
    nowhere. What it says of requests that fail is shown; its bars are on a terminal only, where there are none of
    ours."""
    from lm_eval import evaluator
    from tqdm import tqdm

    talkative = [logging.getLogger(f"lm_eval.{part}") for part in ("evaluator", "models.huggingface", "tasks", "api")]
    levels = [each.level for each in talkative]
    ask_git, ask_pip, make_bar = evaluator.get_git_commit_hash, evaluator.add_env_info, tqdm.__init__
    for each in talkative:
        each.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda found: None
    if not sys.stderr.isatty():
        # Not by TQDM_DISABLE: vLLM divides by what a bar of that kind has not measured.
        tqdm.__init__ = partialmethod(make_bar, disable=True)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info, tqdm.__init__ = ask_git, ask_pip, make_bar
        for each, level in zip(talkative, levels, strict=True):
            each.setLevel(level)


def task_manager(tasks: Sequence[str]) -> Any:
    """lm-eval's TaskManager with our tasks, and with its own where one that is not ours is among `tasks`.

    Args:
        tasks: names that it must know.

    Raises:
        EvalError: it does not know one.
    """
    from difflib import get_close_matches

    manager = lm_eval_manager(foreign=not set(tasks) <= set(own_task_names()))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise EvalError(
            f"{', '.join(unknown)}: no such lm-eval task",
            hint=f"Did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them.",
        )
    return manager
