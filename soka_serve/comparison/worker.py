"""A worker process of a comparison: one run, one record. The fork server imports it once."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before the libraries are imported: what they say about their own insides would be said between the runs' lines.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch  # noqa: E402

from soka_serve.comparison.plan import RunSpec  # noqa: E402
from soka_serve.comparison.read import LoadedSuite  # noqa: E402
from soka_serve.comparison.run import measure_run  # noqa: E402
from soka_serve.errors import SokaError  # noqa: E402
from soka_serve.io.files import write_text_atomic  # noqa: E402


def run_and_record(loaded: LoadedSuite, spec: RunSpec, work: Path, file: Path) -> None:
    """Do one run and write its record; whatever goes wrong is written into the record."""
    logging.getLogger("soka_serve").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    record: Mapping[str, Any]
    try:
        record = measure_run(loaded, spec, work)
    except Exception as error:  # noqa: BLE001 - the suite goes on, and the record says what it was
        message = error.message if isinstance(error, SokaError) else f"{type(error).__name__}: {error}"
        record = spec.failure(message)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            return  # the suite was killed, and one that goes on may have taken this run's folder away
    write_text_atomic(file, json.dumps(spec.describe() | dict(record)) + "\n")
