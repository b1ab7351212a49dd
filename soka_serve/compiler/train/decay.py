"""Weight decay that is annealed to zero over the steps (SoMA, arXiv:2412.04077, whose code has the cosine)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def decay_share(schedule: str, step: int, steps: int) -> float:
    """What is left of the weight decay after `step` of `steps` steps: 1 at first, 0 in the end.

    >>> [decay_share("linear", step, 4) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> decay_share("cosine", 1, 2), decay_share("constant", 3, 4)
    (0.5, 1.0)
    """
    done = min(step / steps, 1.0) if steps > 0 else 0.0
    if schedule == "linear":
        return 1.0 - done
    return round((1 + math.cos(math.pi * done)) / 2, 15) if schedule == "cosine" else 1.0


def anneal_weight_decay(optimizer: torch.optim.Optimizer, share: Callable[[], float]) -> None:
    """Have each group step with its weight decay times `share()`, whatever a resume point says of it."""
    whole = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
    if not any(whole):
        return

    def scale(stepped: torch.optim.Optimizer, *_: Any) -> None:
        left = share()
        for group, decay in zip(stepped.param_groups, whole, strict=True):
            if decay:
                group["weight_decay"] = decay * left

    optimizer.register_step_pre_hook(scale)
