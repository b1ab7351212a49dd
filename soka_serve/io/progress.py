"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

# A log file wants a sign of life now and then, not a line per step.
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def track(total: int, what: str, *, unit: str = "it", enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Show progress of a loop that may take more than two seconds.

    Args:
        total: number of steps (or bytes, with unit = "B").
        what: what is being done, in a word or two.
        unit: what is counted.
        enabled: False shows nothing.

    Yields:
        `advance(detail="", by=1)`: call it after each step.
    """
    if not enabled:
        yield lambda detail="", by=1: None
        return
    if sys.stderr.isatty():
        # delay: work that is over in half a second needs no bar.
        with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", delay=0.5, leave=False) as bar:

            def advance(detail: str = "", by: int = 1) -> None:
                bar.set_postfix_str(detail, refresh=False)
                bar.update(by)

            yield advance
        return
    done, started = 0, time.monotonic()
    last = started

    def log(detail: str = "", by: int = 1) -> None:
        nonlocal done, last
        done += by
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            logger.info("%s: %d of %d %s, %.0f s %s", what, done, total, unit, now - started, detail)

    yield log
    seconds = time.monotonic() - started
    if seconds >= 2:
        logger.info("%s: %d %s in %.1f s", what, done, unit, seconds)
