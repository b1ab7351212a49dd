"""Shared fixtures: nothing in the tests reaches a hub, and every run starts from the same seeds."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from soka_serve.io.child_signals import default_signals

ROOT = Path(__file__).resolve().parent.parent
if sys.dont_write_bytecode:  # Else each of some hundred processes compiles torch, transformers or vLLM anew.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / "build" / "pycache"))

# Before any library reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
# What vLLM finds out about a model's class in a process of its own; it stays where it is when a test moves the caches.
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vllm"))
if "PYTEST_XDIST_WORKER" in os.environ:  # beside another process's threads OpenMP's wait for each other, spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else every server takes the same core

# A shell without job control starts `make test &` with SIGINT ignored, and what is ignored stays so in every child.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
default_signals()

NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make venv installs it)")


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist's processes, where this one starts some, share the hosts of preloaded programs."""
    if getattr(config.option, "tx", None) and not hasattr(config, "workerinput"):
        from tests.support.preloaded import share_hosts

        sharing = share_hosts()
        sharing.__enter__()
        config.add_cleanup(lambda: sharing.__exit__(None, None, None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long modules first; tests marked `gpu` are skipped where there is none (SOKA_REQUIRE_GPU=1 makes that a failure).

    Modules are shared out in this order, and a long one at the end keeps all processes but one idle. Those right in
    tests/unit start many programs.
    """
    items.sort(key=lambda item: (item.path.parent.name != "e2e", item.path.parent != ROOT / "tests" / "unit"))
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("SOKA_REQUIRE_GPU") == "1":
        raise pytest.UsageError("SOKA_REQUIRE_GPU=1, but torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def pristine_loggers() -> None:
    """The loggers that commands set up in this process, as after import, so that every test's `caplog` sees them."""
    for name in ("soka_serve", "soka_vllm", "vllm"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def plain_evaluation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluation with no manifest, no data and no consent in the environment, and nothing read before."""
    from soka_serve.evaluation import prompts

    for name in ("SOKA_EVAL_MANIFEST", "SOKA_EVAL_DATA", "SOKA_ALLOW_CODE_EXECUTION"):
        monkeypatch.delenv(name, raising=False)
    prompts._trained_on.cache_clear()
    yield
    prompts._trained_on.cache_clear()


@pytest.fixture(scope="session")
def lm_tasks() -> Any:
    """lm-eval's manager of our tasks."""
    import tests.support.scripted  # noqa: F401  imports lm-eval without its warnings
    from soka_serve.evaluation.harness import task_manager
    from soka_serve.evaluation.tasks import own_task_names

    return task_manager(own_task_names())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real GSM8K and MBPP files; tests that need it skip loudly without it."""
    folder = Path(os.environ.get("SOKA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "gsm8k_train.jsonl").exists():
        pytest.skip(f"no GSM8K files in {folder}; set SOKA_SHARED_DATA to a folder that has gsm8k_train.jsonl")
    return folder
