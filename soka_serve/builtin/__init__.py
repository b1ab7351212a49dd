"""The embedded base model and the task families that go with it."""

from __future__ import annotations

from pathlib import Path


def base_directory() -> Path:
    """Directory of the embedded checkpoint, a LLaMA that transformers and vLLM load as any other."""
    return Path(__file__).parent / "tiny"
