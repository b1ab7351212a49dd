"""Progress where no terminal shows a bar: plain lines."""

from __future__ import annotations

import logging

import pytest

from soka_serve.io import progress


@pytest.mark.parametrize(
    ("total", "unit", "by", "lines"),
    [
        (28, "module", 1, ["init: 1 of 28 modules, 11 s first", "init: 1 module in 11.0 s"]),
        (300, "step", 300, ["init: 300 of 300 steps, 11 s first", "init: 300 steps in 11.0 s"]),
        (1, "run", 1, ["init: 1 of 1 run, 11 s first", "init: 1 run in 11.0 s"]),
        (13_000_000_000, "B", 52_416, ["init: 52.4 kB of 13 GB, 11 s first", "init: 52.4 kB in 11.0 s"]),
    ],
)
def test_lines(
    total: int, unit: str, by: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), progress.track(total, "init", unit=unit) as advance:
        now = 11.0
        advance("first", by)
    assert [record.getMessage() for record in caplog.records] == lines
