"""Run the run.py of PEFT's method comparison, unchanged, with SOKA among PEFT's methods.

Start it in PEFT's folder method_comparison/MetaMathQA, with the arguments of run.py; see README.md here.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    script = Path("run.py").resolve()
    if not script.is_file():
        sys.exit("no run.py here: start this in PEFT's folder method_comparison/MetaMathQA")
    import soka_serve.peft  # noqa: F401  # registers SOKA, before run.py reads an adapter_config.json

    sys.path.insert(0, str(script.parent))  # run.py imports its neighbours
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
