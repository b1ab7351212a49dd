"""Read vLLM's log: how far a start has come, and what an engine died from."""

from __future__ import annotations

import re

_SHOWN_LINES = 8
_SHOWN_CAUSES = 2
# What vLLM puts before a line: "(EngineCore pid=12) ERROR 11-24 12:00:00 [core.py:12] "
_PROCESS = re.compile(r"^\((?P<name>[^)]*)\) ")
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?:INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d )?(?:\[[^\]]*\] ?)?")
_FAILURE = re.compile(r"\b\w*(?:Error|Exception|error):|^usage:|\berror: ")
# Warnings, their source lines, what is said of Triton, and drawings say nothing of how far the start has come.
_NO_STAGE = re.compile(
    r"\bWARNING |\[importing\.py:|Warning\b|warnings\.warn|^(?:\([^)]*\))?\s*(?:[A-Z]+ \S+ \S+ \[\S+\])?\s*[▄█▀ ]*$|^\s"
)
# What a process says of the end of another one, whose own words come before.
_NO_CAUSE = re.compile(
    r"root cause|Engine core initialization failed|Failed core proc|Worker failed with error|EngineDeadError"
    r"|WorkerProc initialization failed|^SystemExit|^KeyboardInterrupt|CancelledError"
)
_TRACEBACK = "Traceback (most recent call last):"
_WARNING = re.compile(r"^(?:\([^)]*\) )?WARNING ")


def last_stage(log: str) -> str:
    """The last line of vLLM's log that says how far its start has come.

    >>> last_stage('''(Worker pid=5) INFO 11-25 23:35:58 [weights.py:501] Loading weights
    ... x.py:3: UserWarning: odd
    ... WARNING 11-25 23:35:59 [importing.py:44] Triton is installed, but doesn't include CPU backend.
    ... INFO 11-25 23:35:59 [importing.py:97] Triton not installed or not compatible
    ... ''')
    'Loading weights'
    """
    stages = [line for line in log.splitlines() if line.strip() and not _NO_STAGE.search(line)]
    return _PREFIX.sub("", stages[-1]).rstrip() if stages else "importing"


def root_causes(log: str) -> list[str]:
    """The last lines of the tracebacks that no other process's end explains, the latest last; at most two.

    Where workers or the engine have any, the API process's, which had to follow, are left out.

    >>> root_causes('''(Worker pid=3) ERROR 11-29 16:53:34 [m.py:1] Traceback (most recent call last):
    ... (Worker pid=3) ERROR 11-29 16:53:34 [m.py:1]   File "t.py", line 322, in apply
    ... (Worker pid=3) ERROR 11-29 16:53:34 [m.py:1] AttributeError: no attribute 'float32'
    ... (EngineCore pid=2) ERROR 11-29 16:53:34 [c.py:1] Traceback (most recent call last):
    ... (EngineCore pid=2) ERROR 11-29 16:53:34 [c.py:1] RuntimeError: Worker failed with error 'no attribute'
    ... ''')
    ["AttributeError: no attribute 'float32'"]
    """
    found: list[tuple[bool, str]] = []
    inside: set[str] = set()  # processes, whose lines come between one another's
    ended = ""  # the process whose message may go on
    for line in log.splitlines():
        match = _PROCESS.match(line)
        process, text = match["name"] if match else "", _PREFIX.sub("", line).rstrip()
        if text == _TRACEBACK:
            inside.add(process)
            ended = ""
        elif process in inside and text and not text.startswith((" ", "\t")):
            inside.remove(process)
            ended = process
            found.append((not process.lower().startswith("apiserver") and bool(process), text))
        elif found and ended == process and text.startswith("  ") and len(found[-1][1]) < 500:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text.strip()}")  # a message of several lines
        else:
            ended = ""
    causes = [(engine, text) for engine, text in found if not _NO_CAUSE.search(text)]
    engines = [text for engine, text in causes if engine]
    return list(dict.fromkeys(engines or [text for _, text in causes]))[-_SHOWN_CAUSES:]


def failure_lines(log: str) -> list[str]:
    """What a log says of why vLLM ended: root causes; else lines that name a failure; else its last lines."""
    lines = [line for line in log.splitlines() if line.strip()]
    named = [line for line in lines if _FAILURE.search(_PREFIX.sub("", line)) and not _WARNING.match(line)]
    shown = [_PREFIX.sub("", line).rstrip() for line in named or lines]
    told = [line for line in shown if not _NO_CAUSE.search(line)]
    return root_causes(log) or list(dict.fromkeys(told or shown))[-_SHOWN_LINES:]
