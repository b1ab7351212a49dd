"""PEFT knows SOKA in a program that imports torch and then PEFT, and nothing of ours; each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

INSTALL = "import torch\nfrom soka_autoload import install\ninstall()\ninstall()\n"  # torch calls it once


def run(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    # Of other libraries' imports; our own warning would still be an error.
    quiet = ["-W", "error::UserWarning:soka_serve", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([sys.executable, *quiet, "-c", code], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow  # imports torch and PEFT
@pytest.mark.parametrize(
    "before",
    ["", "import importlib.util\nassert importlib.util.find_spec('peft')\n", "import soka_serve.peft\n"],
    ids=["plain", "looked for first", "ours first"],
)
def test_peft_knows_the_type(root: Path, before: str) -> None:
    code = f"{INSTALL}{before}import peft, importlib.resources\nprint(peft.PeftType.SOKA.value)\n"
    code += "print(type(peft.__loader__).__name__, importlib.resources.files('peft').joinpath('__init__.py').is_file())"
    done = run(code, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SOKA", "SourceFileLoader", "True"]


@pytest.mark.slow  # imports torch and PEFT
def test_a_program_whose_first_import_is_from_peft(root: Path, tmp_path: Path) -> None:
    """PEFT then imports torch, which calls us in the midst of it."""
    (tmp_path / "calls.py").write_text(  # as torch does at the end of its import; harmless where it did already
        "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'peft.auto':\n            import soka_autoload\n            soka_autoload.install()\n"
        "sys.meta_path.insert(0, Hook())\n"
    )
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport calls\nfrom peft import AutoPeftModelForCausalLM\n"
    )
    code += "import peft\nprint('SOKA' in peft.PeftType.__members__, type(peft.__spec__).__name__)"
    done = run(code, root)
    assert done.stdout.split() == ["True", "ModuleSpec"], done.stderr


@pytest.mark.slow
def test_a_failure_does_not_stop_peft(root: Path) -> None:
    """A program that uses PEFT for something else goes on, and is told."""
    code = f"{INSTALL}import sys\nsys.modules['soka_serve.peft'] = None\nimport peft\n"
    code += "print('SOKA' in peft.PeftType.__members__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"]
    assert "soka-serve could not register its adapter type with PEFT" in done.stderr


def test_it_is_the_entry_point_that_torch_calls(root: Path) -> None:
    assert 'soka_serve = "soka_autoload:install"' in (root / "pyproject.toml").read_text()
    code = "import sys\nbefore = set(sys.modules)\nimport soka_autoload\nsoka_autoload.install()\n"
    code += "print(sorted(set(sys.modules) - before - {'__future__'}))"
    assert run(code, root).stdout == "['soka_autoload']\n"


# ------------------------------------------------------------------------------------- programs that are not ours


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An environment with a PEFT that is too old."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("import warnings\nOLD = True\n")
    (tmp_path / "peft" / "data.txt").write_text("its own")
    return tmp_path


def run_foreign(folder: Path, code: str, *options: str, root: Path, **variables: str) -> str:
    """What a program prints, which must not fail."""
    path = os.pathsep.join([str(folder), str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, *options, "-c", "import soka_autoload\nsoka_autoload.install()\n" + code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_old_peft_with_warnings_as_errors(foreign: Path, root: Path) -> None:
    said = run_foreign(foreign, "import peft\nassert peft.OLD\nprint('goes on')", "-W", "error", root=root)
    assert "goes on" in said
    assert "could not register" in said


def test_the_package_may_be_gone(foreign: Path, root: Path) -> None:
    """The entry point's file alone, as after a removal that stopped half way."""
    shutil.copy(root / "plugins" / "soka_autoload" / "__init__.py", foreign / "soka_autoload.py")
    code = "import sys\nsys.modules['soka_serve'] = None\nimport peft\nprint(peft.OLD)"
    assert "True" in run_foreign(foreign, code, "-W", "error", root=root)


def test_metadata_of_an_earlier_installation_is_harmless(tmp_path: Path, root: Path) -> None:
    """Editable installs keep calling soka_serve.autoload after an update, and may not find the other file."""
    code = "import sys\nsys.modules['soka_autoload'] = None\nfrom soka_serve.autoload import install\ninstall()"
    assert run(code, root).returncode == 0


@pytest.mark.slow  # imports torch
def test_torch_imports_with_metadata_and_no_package(tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "plugins" / "soka_autoload" / "__init__.py", tmp_path / "soka_autoload.py")
    metadata = tmp_path / "other_soka-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-soka\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nother_soka = soka_autoload:install\n")
    code = (  # the environment of the tests has soka-serve's own entry point, whose package is gone here
        "import importlib.metadata as metadata, sys\nfound = metadata.entry_points\n"
        "metadata.entry_points = lambda **of: [e for e in found(**of) if e.name == 'other_soka']\n"
        "sys.modules['soka_serve'] = None\nimport torch\n"
    )
    code += "print(any(type(f).__module__ == 'soka_autoload' for f in sys.meta_path))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout == "True\n", done.stderr


def test_data_and_loader_of_peft_are_its_own(foreign: Path, root: Path) -> None:
    code = (
        "import pkgutil, importlib.util\n"
        "loader = importlib.util.find_spec('peft').loader\n"
        "assert type(loader).__name__ == 'SourceFileLoader', loader\n"
        "assert loader.get_data(loader.path)\n"
        "sys = __import__('sys'); sys.modules['soka_serve'] = None\n"
        "assert pkgutil.get_data('peft', 'data.txt') == b'its own'\n"
        "import peft, importlib\nassert 'exec_module' not in vars(peft.__loader__)\nimportlib.reload(peft)\n"
    )
    run_foreign(foreign, code, root=root)


def test_one_variable_turns_it_off(foreign: Path, root: Path) -> None:
    code = "import sys\nprint(any(type(f).__module__ == 'soka_autoload' for f in sys.meta_path))"
    assert run_foreign(foreign, code, root=root) == "True\n"
    assert run_foreign(foreign, code, root=root, SOKA_AUTOLOAD="0") == "False\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.meta_path.append(object())\nimport peft",
        "import sys\nsys.modules['peft'] = None\nsoka_autoload.install()",
        "import sys\nsys.meta_path = ()\nsoka_autoload.install()",
        "import logging, sys\nsys.modules['soka_serve'] = None\n"
        "class Bad(logging.Handler):\n    def handle(self, record):\n        raise RuntimeError\n"
        "logging.getLogger().addHandler(Bad())\nimport peft",
        "try:\n    import peft.none\nexcept ModuleNotFoundError:\n    pass\nelse:\n    raise SystemExit(1)",
    ],
    ids=["a finder of the old kind", "peft forbidden", "meta_path replaced", "a handler that raises", "no submodule"],
)
def test_nothing_that_programs_do_makes_it_fail(foreign: Path, root: Path, code: str) -> None:
    run_foreign(foreign, code, "-W", "error", root=root)


@pytest.mark.parametrize("after", ["", "raise OSError('its own error')\n"], ids=["", "and PEFT fails"])
def test_a_peft_that_is_being_imported(foreign: Path, root: Path, after: str) -> None:
    """As when PEFT imports torch: the type is registered when PEFT is done, and not before."""
    (foreign / "peft" / "__init__.py").write_text(
        "import soka_autoload, sys\nsoka_autoload._register = lambda: print('registered', sys.modules['peft'].DONE)\n"
        f"soka_autoload.install()\n{after}DONE = True\n"
    )
    path = [str(root / "plugins"), str(foreign)]
    code = f"import sys\nsys.path[:0] = {path!r}\n"
    code += "try:\n    import peft, peft\nexcept OSError as error:\n    print(error)"
    done = run(code, root)
    assert (done.stdout, done.stderr) == ("its own error\n" if after else "registered True\n", "")


def test_a_peft_that_fails_fails_as_without_us(foreign: Path, root: Path) -> None:
    (foreign / "peft" / "__init__.py").write_text("raise OSError('its own error')\n")
    code = "try:\n    import peft\nexcept OSError as error:\n    print(error)"
    assert run_foreign(foreign, code, root=root) == "its own error\n"


@pytest.mark.parametrize("place", [0, 1], ids=["before", "after"])
def test_another_finder_that_goes_through_the_list(foreign: Path, root: Path, place: int) -> None:
    """Each asks the other, which has no end unless one of them stops."""
    code = f"""
import sys
import zipfile
class Other:
    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        found = (f.find_spec(name, path, target) for f in list(sys.meta_path) if not isinstance(f, Other))
        return next((spec for spec in found if spec is not None), None)
sys.meta_path.insert({place}, Other())
import peft
print(peft.OLD)
"""
    assert "True" in run_foreign(foreign, code, root=root)


@pytest.mark.slow  # imports torch
def test_a_deleted_checkout_does_not_break_torch(tmp_path: Path, root: Path) -> None:
    """The wheel of `pip install -e`, put into a site folder of its own; then the checkout goes."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "results", ".*_cache", "__pycache__", "*.egg-info")
    for name in ("soka_serve", "plugins", "eval/tasks"):
        shutil.copytree(root / name, checkout / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, checkout)
    build = "from setuptools import build_meta\nprint(build_meta.build_editable(__import__('sys').argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "soka_autoload" / "__init__.py").is_file()
    shutil.rmtree(checkout)
    code = (  # the tests' own environment has this entry point, too
        f"import site, sys\nsite.addsitedir({str(site)!r})\nsys.path.insert(0, {str(site)!r})\n"
        "import importlib.metadata as metadata\nfound = metadata.entry_points\n"
        f"own = metadata.Distribution.at({str(next(site.glob('*.dist-info')))!r}).entry_points\n"
        "metadata.entry_points = lambda **of: own.select(**of)\n"
        "import torch\nprint(any(type(f).__module__ == 'soka_autoload' for f in sys.meta_path), "
        "sys.modules['soka_autoload'].__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["True", str(site / "soka_autoload" / "__init__.py")], done.stderr
