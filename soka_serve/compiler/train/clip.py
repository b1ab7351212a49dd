"""The norm that gradients are clipped to: a multiple of their usual norm, the median of the last steps' norms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

_STEPS = 32  # that the median is taken over
_FEWEST = 8  # steps before which nothing is clipped


class RelativeClip:
    """The norm that gradients are clipped to; how large gradients are depends on the model, the loss and the method.

    Args:
        multiple: of the median; 0: nothing is clipped (the trainer scales every gradient to norm 1).
        norms: those of the steps before, of an interrupted run.
    """

    def __init__(self, multiple: float, norms: Iterable[float] = ()) -> None:
        self.multiple = multiple
        self.norms = deque(norms, maxlen=_STEPS)

    @property
    def limit(self) -> float:
        """The largest norm that the next step may have; infinite at first."""
        return self.multiple * median(self.norms) if self.multiple and len(self.norms) >= _FEWEST else math.inf

    def add(self, norm: float) -> None:
        """Note the norm of a step's gradient, before it was clipped; one that is not finite does not count."""
        if math.isfinite(norm):
            self.norms.append(norm)
