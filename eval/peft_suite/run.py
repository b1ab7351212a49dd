"""PEFT's own tests, with SOKA among its methods.

python eval/peft_suite/run.py 0.21.2 --work build/peft-suite --out build/peft-suite.json      (part of `make compat`)

Downloads the release's source distribution, which has the tests, makes tiny random models in place of the hub's
(`stand_ins.py`), and runs the tests twice: SOKA's cases beside those of the other methods (`soka_cases.py`), and SOKA
in LoKr's place in the files that name LoKr. Reports what passed, failed, was skipped by PEFT, and what is not
applicable and why. Needs diffusers, which PEFT's tests import. Nothing of PEFT's is kept in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

BESIDE = (
    "auto", "config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
    "helpers", "initialization", "low_level_api", "other", "seq_classifier", "token_classification_qa", "tuners_utils",
)  # fmt: skip
IN_PLACE = ("mixed", "lora_conversion")

# Tests that cannot pass with SOKA, by the start of their name, and why. They run, and count neither way.
NOT_APPLICABLE = {
    "test_base_model_module_named_like_peft_prefix": "the test's own table of prefixes has LoRA and LoKr only; "
    "tests/parity/test_peft_variants.py tests the same",
    "test_self_targeting_is_ignored": "one of its cases adapts a convolution",
    "test_model_with_unsupported_layers_raises": "adapts a convolution",
    "test_targeted_modules_identical": "looks for LoKr's parameters by name",
    "test_lora_conversion": "how near LoRA of rank 8 comes to a delta that is not of low rank, on a random model",
    "test_converted_lora_approximates_original_adapter": "as test_lora_conversion",
    "test_converted_lora_with_multiple_adapters": "as test_lora_conversion",
}


def fetch(release: str, work: Path) -> Path:
    """The release's source distribution, unpacked; `tests` is a package there, as in PEFT's repository."""
    folder = work / f"peft-{release}"
    if not (folder / "tests" / "__init__.py").exists():
        work.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "peft", "-d", str(work), f"peft=={release}"], check=True)
        with tarfile.open(work / f"peft-{release}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        (folder / "tests" / "__init__.py").touch()
    return folder


def run(folder: Path, stand_ins: Path, files: tuple[str, ...], *, in_place: bool) -> list[dict[str, str]]:
    """Run the tests in some files; each with its name, its outcome, and the reason of a failure or skip."""
    report = folder / f"report-{'in-place' if in_place else 'beside'}.xml"
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, HERE, ROOT, ROOT / "plugins"))),
        "HF_HUB_OFFLINE": "1",
        "SOKA_SUITE_STAND_INS": str(stand_ins),
        "SOKA_SUITE_IN_PLACE_OF_LOKR": "1" if in_place else "0",
    }
    paths = [str(folder / "tests" / f"test_{name}.py") for name in files]
    options = ["-q", "-W", "ignore", "-c", os.devnull, "--rootdir", str(folder), "--tb", "line"]
    plugins = ["-p", "soka_cases", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", *plugins, *options]
    done = subprocess.run([*command, f"--junitxml={report}", *paths], cwd=folder, env=environment, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ended with {done.returncode} and made no report")
    return [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def _outcome(case: ElementTree.Element) -> dict[str, str]:
    name = f"{Path(case.get('file', '')).stem}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return {"name": name, "outcome": kind, "why": (found.get("message") or "").splitlines()[0:1][0][:300]}
    return {"name": name, "outcome": "passed", "why": ""}


def summary(cases: list[dict[str, str]]) -> dict[str, Any]:
    """Counts, failures by name, and the reasons of what does not count."""
    failed: list[str] = []
    aside: Counter[str] = Counter()
    for case in cases:
        if case["outcome"] not in ("failure", "error"):
            continue
        test = case["name"].partition("::")[2]
        reason = next((why for start, why in NOT_APPLICABLE.items() if test.startswith(start)), None)
        if reason is None:
            failed.append(f"{case['name']}: {case['why']}")
        else:
            aside[f"{case['name']}: {reason}"] += 1
    return {
        "passed": sum(case["outcome"] == "passed" for case in cases),
        "failed": failed,
        "not_applicable": sorted(aside),
        "skipped_by_peft": dict(Counter(case["why"] for case in cases if case["outcome"] == "skipped").most_common()),
    }


def run_suite(release: str, work: Path) -> dict[str, Any]:
    """All of it; see the module."""
    stand_ins = work / "stand-ins"
    subprocess.run([sys.executable, "-W", "ignore", str(HERE / "stand_ins.py"), str(stand_ins)], check=True)
    folder = fetch(release, work)
    cases = run(folder, stand_ins, BESIDE, in_place=False)
    cases += run(folder, stand_ins, IN_PLACE, in_place=True)
    return {"release": release, **summary(cases)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="of PEFT, as installed")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peft-suite", help="folder for what is fetched")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    found = run_suite(arguments.release, arguments.work.resolve())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print({key: value if isinstance(value, int) else len(value) for key, value in found.items() if key != "release"})
    print(*found["failed"], sep="\n")
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
