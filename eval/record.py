"""What all benchmarks and checks share: their command line, what they say of the machine, and the file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soka_serve.io.files import write_text_atomic
from soka_serve.io.hardware import cpu_name
from soka_serve.io.versions import versions

Pairs = Mapping[str, object] | tuple[()]


def make_parser(module: str, description: str | None, *, needs_out: bool = False) -> argparse.ArgumentParser:
    """A parser with `--out`, whose help begins with a module's docstring, as it is written there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(module=module)
    parser.add_argument("--out", type=Path, required=needs_out, help="JSON file to write")
    return parser


def command_of(options: argparse.Namespace) -> str:
    """The command with every setting written out, but for `--out`; a path is its option's name in capitals."""
    words = ["python", "-m", options.module]
    for name, value in vars(options).items():
        if name in ("module", "out") or value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path):
                words.append(name.upper())
            elif one is not True:
                words.append(f"{one:g}" if isinstance(one, float) else str(one))
    return shlex.join(words)


def write_record(
    options: argparse.Namespace, found: Mapping[str, Any], *, machine: Pairs = (), packages: Pairs = ()
) -> dict[str, Any]:
    """Write what was found to `--out`, if that is given, as JSON; returns the whole record.

    It begins with the command, the versions (`packages` among them) and the machine (with what `machine` adds).
    """
    hardware = {"cpu": cpu_name(), "machine": platform.machine(), "cpu_cores": os.cpu_count(), **dict(machine)}
    record = {"command": command_of(options), "versions": versions() | dict(packages), "hardware": hardware, **found}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.out, json.dumps(record, indent=1) + "\n")
    return record
