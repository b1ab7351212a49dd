"""The embedded base model and the task families that go with it."""

from __future__ import annotations

from pathlib import Path

from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import (
    EASY_FAMILIES,
    FAMILIES,
    TARGET_FAMILIES,
    check_answer,
    draw_problems,
    generate,
)

__all__ = [
    "EASY_FAMILIES",
    "FAMILIES",
    "TARGET_FAMILIES",
    "Problem",
    "base_directory",
    "check_answer",
    "draw_problems",
    "generate",
]


def base_directory() -> Path:
    """Directory of the embedded checkpoint, a LLaMA that transformers and vLLM load as any other."""
    return Path(__file__).parent / "tiny"
