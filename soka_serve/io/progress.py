"""Progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from soka_serve.io.text import size

logger = logging.getLogger(__name__)

# A log file wants a sign of life now and then, not a line per step.
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def track(total: int, what: str, *, unit: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Show progress of a loop that may take more than two seconds.

    Args:
        total: number of steps (or bytes, with unit = "B").
        what: what is being done, in a word or two.
        unit: what is counted, in the singular.
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
            part = size(done) if unit == "B" else done
            logger.info("%s: %s of %s, %.0f s %s", what, part, _amount(total, unit), now - started, detail)

    yield log
    seconds = time.monotonic() - started
    if seconds >= 2:
        logger.info("%s: %s in %.1f s", what, _amount(done, unit), seconds)


def _amount(number: int, unit: str) -> str:
    return size(number) if unit == "B" else f"{number} {unit}{'' if number == 1 else 's'}"
