"""The plugin's tests with every vLLM release from the oldest claimed on, the PEFT type's with every PEFT release.

With PEFT, its own tests too, with SOKA among its methods: see eval/peft_suite/run.py.

python -m eval.checks.compat --out eval/results/compat.json          (`make compat` writes build/compat.json)

Makes a virtual environment per release under build/compat (about 3 GB each for vLLM; kept, so that a second run only
tests), installs this checkout and the release there, and runs the tests in it. What is claimed is read from
pyproject.toml; the releases from the package index, of vLLM also those after the range, so that a new one is found
without being asked for. Everything else (transformers, for one) is the newest that pip finds to go with them, which the
results name. CPU builds of vLLM, unless --engine cuda. A release of vLLM of which there is no CPU build is compared by
the sources in its wheel, and nothing of it is run (`--only sources` does that alone).
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from eval.record import make_parser, write_record
from soka_vllm.hooks import signatures
from soka_vllm.sources import is_of_vllm, source_problems, wheel_sources

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "vllm": [
        "tests/e2e/test_serve_mixed.py",
        "tests/e2e/test_serve_layers.py",
        "tests/e2e/test_serve_sums.py",
        "tests/e2e/test_serve_api.py",
        "tests/e2e/test_serve_many.py",
        "tests/e2e/test_serve_malformed.py",
        "tests/e2e/test_serve_remote.py",
        "tests/e2e/test_serve_tp.py",
        "tests/parity/test_plugin_op.py",
        "tests/parity/test_plugin_triton.py",
        "tests/unit/soka_vllm",
    ],
    "peft": [
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "parity").glob("test_peft*.py")),
        "tests/unit/peft/test_config.py",
        "tests/unit/adapter/test_format.py",
        "tests/unit/compiler/test_train.py",
        "tests/e2e/test_peft_trainers.py",
        "tests/e2e/test_build.py",
    ],
}
PARALLEL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # as the Makefile's
BESIDE = ("torch", "transformers", "huggingface-hub", "accelerate", "peft")  # whose versions pip chose
_SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error|errors|deselected|xfailed)")


def claimed(engine: str) -> dict[str, Requirement]:
    """The requirement on vLLM and the one on PEFT, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = project["optional-dependencies"][engine]
    (peft,) = (entry for entry in project["dependencies"] if Requirement(entry).name == "peft")
    return {"vllm": Requirement(vllm), "peft": Requirement(peft)}


def releases(requirement: Requirement) -> list[str]:
    """Releases, oldest first: of PEFT every one in the range, of vLLM the last patch of each from its beginning on."""
    command = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"Available versions: (.*)", said)
    if listed is None:
        raise SystemExit(f"pip names no versions of {requirement.name}:\n{said}")
    versions = sorted(Version(v) for v in listed[1].split(", "))
    found = list(requirement.specifier.filter(versions))
    if requirement.name != "peft":
        later = [v for v in versions if v > found[-1] and not v.is_prerelease]
        found = list({(v.major, v.minor): v for v in [*found, *later]}.values())
    return [str(v) for v in found]


def not_built(requirement: Requirement) -> list[str]:
    """The releases of vLLM of which the package index has no CPU build."""
    built = {Version(v).release[:2] for v in releases(requirement)}
    all_of_them = releases(Requirement(f"vllm{requirement.specifier}"))
    return [release for release in all_of_them if Version(release).release[:2] not in built]


def compare_sources(found: dict[str, Any], release: str) -> None:
    """Put what in the sources of a release's wheel differs from what the plugin uses into `found`."""
    found["tests"] = "sources"
    started = time.monotonic()
    folder = ROOT / "build" / "compat" / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
    _call([*pip, "-d", str(folder), f"vllm=={release}"])
    (wheel,) = folder.glob(f"vllm-{release}-*.whl")
    wanted = list(filter(is_of_vllm, signatures(release)))
    problems = source_problems(wheel_sources(wheel), wanted)
    seconds = round(time.monotonic() - started)
    found |= {"ok": not problems, "signatures": len(wanted), "failures": problems, "seconds": seconds}


def make_environment(folder: Path, engine: str, requirement: Requirement, release: str) -> None:
    """A virtual environment with this checkout and the release; whole, or made anew."""
    ready = folder / ".ready"
    if ready.exists():
        return
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    # Held to the torch that the tests ran with; a release after the range may ask for another.
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    constraints = folder / "constraints.txt"
    held = engine == "cpu" and release in requirement.specifier
    constraints.write_text("\n".join(pins) + "\n" if held else "")
    _call([*pip, "--upgrade", "pip", "setuptools>=77"])
    if held:
        _call([*pip, "-c", str(constraints), "torch"])
    # Not the engine's extra: pip would refuse a release after the range.
    extras = "dev" if requirement.name != "peft" else "kbit,dev"
    wanted = [f"{requirement.name}=={release}", "openai", "-e", f"{ROOT}[{extras}]"]
    _call([*pip, "-c", str(constraints), *wanted])
    if engine == "cpu":  # see the Makefile
        drop = [str(folder / "bin" / "python"), "-m", "pip", "uninstall", "-qq", "--yes"]
        _call([*drop, "torchvision", "torchaudio", "torchcodec"])
    ready.touch()


def _call(command: list[str]) -> None:
    """Run a command.

    Raises:
        RuntimeError: it failed, with the last that it said.
    """
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = " ".join((done.stderr or "").strip().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said}")


def chosen(folder: Path) -> dict[str, str]:
    """The versions of what else is in an environment."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    versions = {package["name"].replace("_", "-").lower(): package["version"] for package in listed}
    return {name: versions.get(name, "not installed") for name in BESIDE}


def run_tests(folder: Path, tests: list[str]) -> dict[str, Any]:
    """pytest's counts; and what it said of failures."""
    started = time.monotonic()
    done = subprocess.run(
        [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-rf", *PARALLEL, *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"},
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {what.rstrip("s"): int(number) for number, what in _SUMMARY.findall(last)}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        failed = (done.stdout + done.stderr).strip().splitlines()[-5:]
    return {"ok": done.returncode == 0, **counts, "failures": failed, "seconds": round(time.monotonic() - started)}


def run_peft_suite(folder: Path, release: str) -> dict[str, Any]:
    """PEFT's own tests with SOKA's cases, in an environment: passed, failed and not applicable by name."""
    python, work = str(folder / "bin" / "python"), ROOT / "build" / "compat" / "peft-suite"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "diffusers", "parameterized"]
    _call(pip)
    out = work / f"{release}.json"
    out.unlink(missing_ok=True)
    script = str(ROOT / "eval" / "peft_suite" / "run.py")
    done = subprocess.run([python, script, release, "--work", str(work), "--out", str(out)], check=False)
    if not out.exists():
        return {"failed": [f"{script} ended with {done.returncode}"]}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def check_release(found: dict[str, Any], kind: str, engine: str, requirement: Requirement, release: str) -> None:
    """Put what the tests say in an environment with the release into `found`, step by step."""
    folder = ROOT / "build" / "compat" / f"{requirement.name}-{release}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    found["tests"] = TESTS[kind]
    make_environment(folder, engine, requirement, release)
    found["beside"] = chosen(folder)
    found |= run_tests(folder, TESTS[kind])
    if kind == "peft":
        found["peft_own_tests"] = run_peft_suite(folder, release)
        found["ok"] = found["ok"] and not found["peft_own_tests"]["failed"]


def attempt(work: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What a release's check found, and why it could not go on: the other releases are checked all the same."""
    found: dict[str, Any] = {}
    try:
        work(found)
    except Exception as error:  # noqa: BLE001 - of pip, a wheel, a parser: it is this release's result
        found |= {"ok": False, "failures": [*found.get("failures", []), f"{type(error).__name__}: {error}"]}
    return found


def main() -> None:
    parser = make_parser("eval.checks.compat", __doc__, needs_out=True)
    parser.add_argument("--engine", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", action="extend", nargs="+", metavar="NAME[==RELEASE]", help="vllm, sources, peft==0.21.0, ..."
    )
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    ranges = claimed(arguments.engine)

    def wanted(kind: str, release: str) -> bool:
        return not arguments.only or bool({kind, f"{kind}=={release}"} & set(arguments.only))

    def add(requirement: Requirement, release: str, found: dict[str, Any]) -> None:
        print({k: v for k, v in found.items() if k != "failures"}, *found["failures"], sep="\n  ", flush=True)
        known = {"release": release, "claimed": release in requirement.specifier}
        results.append({"package": requirement.name, **known, **found})
        versions = {"python": platform.python_version()}  # the others are each environment's own
        said = {name: str(value) for name, value in ranges.items()}
        write_record(arguments, {"claimed": said, "versions": versions, "results": results})

    for kind, requirement in ranges.items():
        for release in releases(requirement):
            if not wanted(kind, release):
                continue
            print(f"{requirement.name} {release}: ", end="", flush=True)
            check = partial(check_release, kind=kind, engine=arguments.engine, requirement=requirement, release=release)
            add(requirement, release, attempt(check))
    if arguments.engine == "cpu" and (not arguments.only or any(o.startswith("sources") for o in arguments.only)):
        for release in not_built(ranges["vllm"]):
            if wanted("sources", release):
                print(f"vllm {release}, by its sources: ", end="", flush=True)
                requirement = Requirement(f"vllm{ranges['vllm'].specifier}")
                add(requirement, release, attempt(partial(compare_sources, release=release)))
    sys.exit(any(not result["ok"] for result in results))


if __name__ == "__main__":
    main()
