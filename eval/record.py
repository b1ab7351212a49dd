"""What all benchmarks and checks share: their command line, what they say of the machine, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring, as it is written there."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def cpu_name() -> str:
    """What the processor calls itself, on Linux; "unknown" elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def hardware(**more: object) -> dict[str, Any]:
    """The machine of a record, and `more` of it."""
    return {"cpu": cpu_name(), "machine": platform.machine(), "cpu_cores": os.cpu_count(), **more}


def write_record(out: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; None: nowhere."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
