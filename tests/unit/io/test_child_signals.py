"""Children begin with every signal as the system has it, whatever their parent was started with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# As a shell without job control starts `command &`; some parents block signals, or ignore others.
IGNORED = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
)


def ignoring(code: str, root: Path) -> str:
    """What code prints in a process that was started with SIGINT and SIGPROF ignored."""
    done = subprocess.run(
        [sys.executable, "-c", IGNORED + code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("before", ["", "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])\n"])
def test_vllm_ends_at_the_signal_that_soka_serve_ignores(before: str, root: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom soka_serve.serving.command import Launch\n"
        "from soka_serve.serving.process import Server\n"
        "child = (sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(30)')\n"
        f"server = Server(Launch(child), Path({str(tmp_path / 'log')!r}))\n"
        "while not server.log.read_text(): time.sleep(0.02)\n"
        "os.kill(server._process.pid, signal.SIGINT)\n"
        "print(server._process.wait(20))"
    )
    assert ignoring(before + code, root) == "-2"


def test_a_template_is_stopped_though_the_signal_of_its_limit_is_ignored(root: Path) -> None:
    code = (
        "from soka_serve.manifest.template_child import render\n"
        "loop = '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'\n"
        "print([found.message for found in render('row', loop, [{}])])"
    )
    assert "s of processor time" in ignoring(code, root)


def test_children_of_tests(root: Path) -> None:
    code = (
        "import tests.conftest\nchild = subprocess.Popen(['sleep', '30'])\n"
        "child.send_signal(signal.SIGINT)\nprint(child.wait(20))"
    )
    assert ignoring(code, root) == "-2"


def test_soka_serve_itself_ignores_what_it_was_told_to_and_ends_at_sigterm(root: Path) -> None:
    """Ctrl-C in the terminal of a script is not meant for what the script runs in the background."""
    code = (
        "from soka_serve.serving.process import StopSignal, signals_stop\n"
        "try:\n    with signals_stop():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        print('runs on')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(9)\n"
        "except StopSignal as stopped:\n    print(signal.Signals(stopped.number).name)\n"
        "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    )
    assert ignoring(code, root).split("\n") == ["runs on", "SIGTERM", "True"]
