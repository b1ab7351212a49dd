"""Failures inside PEFT's calls. PEFT's own methods raise ValueError there, so programs that catch it catch these."""

from __future__ import annotations

from soka_serve.errors import CheckpointError, PlanError


class FitError(PlanError, ValueError):
    """An impossible setting, or an adapter that does not fit the model."""


class MergeError(CheckpointError, ValueError):
    """A merged weight that is not finite, or a merge that the layer's state does not allow."""
