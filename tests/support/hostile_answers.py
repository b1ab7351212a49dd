"""What a program sends: frames of its own making, and values that harm who compares them. None may pass."""

from __future__ import annotations

import json

FRAMES = {
    "refused": {"refused": "Landlock: this kernel does not have it"},
    "refused, with names": {"refused": "", "names": {"f": {"h": 0}}},
    "closed": {"closed": True, "passed": True},
    "passed": {"passed": True, "reason": "", "nonce": ""},
    "an error that is a structure": {"error": {"passed": True, "refused": "x"}},
    "names that are a list": {"names": ["f"]},
    "names that are text": {"names": "f"},
    "no name": {"names": {}},
    "a number for a function": {"names": {"f": 2}},
    "a type for a function": {"names": {"f": {"k": "object"}}},
    "the loader for a function": {"names": {"f": {"k": "__loader__"}}},
    "no type for a function": {"names": {"f": {"k": "print"}}},
    "a handle that was never given": {"names": {"f": {"h": 10**30}}},
    "a handle below zero": {"names": {"f": {"h": -1}}},
    "a module for a function": {"names": {"f": {"m": "os"}}},
    "a module that opens a browser": {"names": {"f": {"m": "antigravity"}}},
    "a module that runs": {"names": {"f": {"m": "unittest.__main__"}}},
    "a module that is a class": {"names": {"f": {"m": "typing.io"}}},
    "a module that is the checker": {"names": {"f": {"m": "__main__"}}},
    "a module that is no name": {"names": {"f": {"m": "os..path"}}},
    "a module that is no text": {"names": {"f": {"m": {"m": "os"}}}},
    "two tags": {"names": {"f": {"h": 0, "k": "int"}}},
    "the names of the tests' frame": {"names": {"f": 2, "__builtins__": {}, "__name__": "x", "AssertionError": 1}},
}
"""What is written as the first frame, instead of the names that the program defines."""

_DEEP = """
def f():
    value = []
    for _ in range({depth}):
        value = [value]
    return value
"""

ANSWERS = {
    "a list a million deep": (_DEEP.format(depth=10**6), "assert f() == 1"),
    "a list that is in itself": ("def f():\n    x = []\n    x.append(x)\n    return x", "assert f() == 1"),
    "a number of four million digits": ("def f():\n    return 1 << 15_000_000", "assert str(f()) == '1'"),
    "a decimal with a billion digits": (
        "import decimal\ndef f():\n    return decimal.Decimal('1e999999999')",
        "assert int(f()) == 1",
    ),
    "a fraction with a billion digits": (
        "import fractions\nclass F(fractions.Fraction):\n    __str__ = lambda s: '1e1000000000'\n"
        "def f():\n    return F(1)",
        "assert f() == 1",
    ),
    "a range without an end": ("def f():\n    return range(10**18)", "assert list(f()) == [1]"),
    "a set of numbers with one hash": (
        "class S(set):\n    __iter__ = lambda s: (k * (2**61 - 1) for k in range(100_000))\ndef f():\n    return S()",
        "assert f() == {1}",
    ),
    "strings in millions": ("def f():\n    return ['a'] * 500_000", "assert f() == ['a']"),
    "no number": ("def f():\n    return float('nan')", "assert f() == f()"),
    "no number that raises": ("import decimal\ndef f():\n    return decimal.Decimal('sNaN')", "assert f() == 1"),
    "text that is no text": ("def f():\n    return '\\ud800' * 1000", "assert f().encode() == b''"),
    "a time beyond all times": (
        "import datetime\nclass D(datetime.timedelta):\n    days = 10**12\ndef f():\n    return D()",
        "assert f() == 1",
    ),
    "a set of what has no hash": (
        "class S(set):\n    def __iter__(self):\n        return iter([[]])\ndef f():\n    return S()",
        "assert f() == 1",
    ),
    "an iterator that never ends": (
        "class C:\n    def __iter__(self):\n        while True:\n            yield 1\ndef f():\n    return C()",
        "assert list(f()) == [1]",
    ),
    "a module that is asked for by a test": (
        "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f():\n    return 1.0",
        "assert math.isclose(f(), 5.0)",
    ),
    "a part of a module for the whole": (
        "import unittest.mock as unittest\ndef f():\n    return 1.0",
        "assert unittest.call(f()) == ((1.0,),)",
    ),
    "another module of that name": (
        "import operator as math\nmath.isclose = lambda *a: True\ndef f():\n    return 1.0",
        "assert math.isclose(f(), 5.0)",
    ),
}
"""What a function returns and the test that meets it; no such test may pass."""


def sending(frame: object) -> str:
    """A program that writes a frame to every descriptor as the first thing it does."""
    return f"""
import json, os
body = {json.dumps(frame)!r}.encode()
for fd in range(3, 64):
    try:
        os.write(fd, len(body).to_bytes(4, "big") + body)
    except OSError:
        pass
def f(x):
    return 0
"""


SLOW = {
    "an exception that sleeps when it is shown": (
        "class E(Exception):\n    def __str__(self):\n        __import__('time').sleep(99)\n    __repr__ = __str__\n"
        "def f():\n    raise E",
        "f()",
    ),
    "a byte a second": (
        "import os, time\ndef f():\n    while True:\n        for fd in (3, 4, 5, 6):\n            try:\n"
        "                os.write(fd, b'\\0')\n            except OSError:\n                pass\n"
        "        time.sleep(0.3)",
        "f()",
    ),
    "a frame without an end": (
        "import os, time\ndef f():\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, b'\\0\\x10\\0\\0{')\n        except OSError:\n            pass\n    time.sleep(99)",
        "f()",
    ),
    "nobody reads the arguments": (
        "import time\ndef f(x):\n    return 1\ntime.sleep(0.1)\n"
        "class g:\n    "
        "def __init__(self):\n        time.sleep(99)",
        "g()\nf('x' * 3_000_000)",
    ),
    "stopping itself by a signal for readable data": (
        "import fcntl, os, signal\ndef f():\n    out, into = os.pipe()\n    fcntl.fcntl(out, 10, signal.SIGSTOP)\n"
        "    fcntl.fcntl(out, 8, os.getpid())\n    fcntl.fcntl(out, 4, os.O_ASYNC)\n    os.write(into, b'x')\n"
        "    __import__('time').sleep(99)",
        "assert f() == 1",
    ),
    "deaf to all signals": (
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f():\n    time.sleep(99)",
        "assert f() == 1",
    ),
    "both ends closed": ("import os, time\ndef f():\n    os.closerange(3, 64)\n    time.sleep(99)", "assert f() == 1"),
}
"""Programs that want time, each with a test that needs an answer."""
