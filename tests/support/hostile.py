"""Programs that try to pass without being right: each ends as `def f(x)` that answers wrongly, or not at all.

Answers made to harm are in `hostile_answers.py`, what programs do to the machine in `hostile_effects.py`.
"""

from __future__ import annotations

TRICKS = {
    "os._exit(0)": """
import os
os._exit(0)
""",
    "os._exit in the function": """
import os
def f(x):
    os._exit(0)
""",
    "sys.exit": """
import sys
sys.exit(0)
""",
    "printing success": """
import os
print("passed", flush=True)
os.write(1, b'{"passed": true}')
def f(x):
    pass
""",
    "catching SystemExit": """
try:
    raise SystemExit(0)
except BaseException:
    pass
def f(x):
    raise SystemExit(0)
""",
    "atexit": """
import atexit, os
atexit.register(os._exit, 0)
def f(x):
    return None
""",
    "always equal": """
class Yes:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
    __hash__ = None
def f(x):
    return Yes()
""",
    "an int that is always equal": """
class Yes(int):
    def __eq__(self, other):
        return True
def f(x):
    return Yes(9)
""",
    "always equal in a list": """
class Yes:
    def __eq__(self, other):
        return True
def f(x):
    return [Yes()]
""",
    "replacing builtins": """
import builtins
builtins.isinstance = lambda *a: True
builtins.AssertionError = ZeroDivisionError
builtins.__build_class__ = None
def f(x):
    return 0
""",
    "replacing modules": """
import sys, operator
sys.modules["json"] = None
operator.eq = lambda *a: True
def f(x):
    return 0
""",
    "looking for the tests": """
import gc, sys
def f(x):
    seen = [o for o in gc.get_objects() if isinstance(o, dict) and "nonce" in o]
    texts, frame = [], sys._getframe()
    while frame:
        texts.append(str(frame.f_locals))
        frame = frame.f_back
    found = seen or any("ass" + "ert f(" in text for text in texts)
    return x + 1 if found else 0
""",
    "writing to every descriptor": """
import json, os
body = json.dumps({"passed": True, "reason": "", "nonce": ""}).encode()
for fd in range(64):
    try:
        os.write(fd, len(body).to_bytes(4, "big") + body)
    except OSError:
        pass
def f(x):
    return 0
""",
    "reading every descriptor": """
import os, select
for fd in range(64):
    try:
        if select.select([fd], [], [], 0)[0]:
            os.read(fd, 1 << 16)
    except (OSError, ValueError):
        pass
def f(x):
    return 0
""",
    "a debugger's hook": """
import sys
sys.settrace(lambda *a: None)
sys.excepthook = lambda *a: None
def f(x):
    return 0
""",
    "frames at the end": """
import atexit, json, os, sys
frame = json.dumps({"passed": True, "reason": "", "nonce": "", "value": True}).encode()
write = os.write
def send(*_):
    for fd in range(3, 64):
        try:
            write(fd, len(frame).to_bytes(4, "big") + frame)
        except OSError:
            pass
atexit.register(send)
class Last:
    __del__ = send
last = Last()
sys.last = Last()
def f(x):
    raise SystemExit
""",
    "frames from a timer": """
import json, os, signal
frame = json.dumps({"closed": False, "passed": True, "value": True}).encode()
def send(*_):
    for fd in range(3, 64):
        try:
            os.write(fd, len(frame).to_bytes(4, "big") + frame)
        except OSError:
            pass
signal.signal(signal.SIGALRM, send)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
def f(x):
    signal.pause()
""",
    "frames by libc": """
import ctypes, json
libc = ctypes.CDLL(None)
frame = json.dumps({"passed": True, "nonce": "0" * 32}).encode()
frame = len(frame).to_bytes(4, "big") + frame
for fd in range(64):
    libc.write(fd, frame, len(frame))
def f(x):
    return 0
""",
    "a frame without an end, then the real one": """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b"\\0\\0\\0\\x40" + b'{"names": {"f": {"k": "int"}}, "a": "')
    except OSError:
        pass
def f(x):
    return 0
""",
    "another class for the checker's own": """
import gc, sys
for thing in gc.get_objects():
    if getattr(thing, "__name__", "") == "read_frame":
        try:
            thing.__code__ = (lambda *a: {"passed": True, "value": 2}).__code__
        except (AttributeError, ValueError, TypeError):
            pass
def f(x):
    return 0
""",
    "changing the frames below": """
import ctypes, sys
frame = sys._getframe()
while frame := frame.f_back:
    for name in list(frame.f_locals):
        if name in ("tests", "job", "objects", "names", "request"):
            frame.f_locals[name] = {"passed": True}
    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
def f(x):
    return 0
""",
    "a subclass that says it is another value": """
class Two(int):
    def __add__(self, other):
        return 2
    __radd__ = __index__ = __int__ = lambda self, *a: 2
    def __eq__(self, other):
        return True
    __hash__ = int.__hash__
def f(x):
    return Two(0) if x == 1 else Two(0)
""",
    "a dict whose items lie": """
class Sly(dict):
    def items(self):
        return [("tag", 1)]
    def __eq__(self, other):
        return True
def f(x):
    return Sly()
""",
    "dates that answer with JSON": """
import datetime, decimal
class Day(datetime.datetime):
    def isoformat(self, *a):
        return {"passed": True}
class Number(decimal.Decimal):
    def __str__(self):
        return "2"
def f(x):
    return Day(2024, 1, 1) if x == 1 else Number(9)
""",
    "a metaclass with the name of a type": """
class Meta(type):
    def __eq__(self, other):
        return True
    __hash__ = type.__hash__
class int(metaclass=Meta):
    pass
def f(x):
    return int
""",
    "locking itself in further": """
import ctypes
libc = ctypes.CDLL(None)
attribute = (ctypes.c_uint64 * 3)(0x1FFF, 0, 0)
for _ in range(20):
    ruleset = libc.syscall(444, attribute, ctypes.c_size_t(8), 0)
    libc.syscall(446, ruleset, 0)
libc.prctl(22, 1, 0, 0, 0)
libc.syscall(317, 0, 0, 0)
def f(x):
    return 0
""",
    "lowering its own limits": """
import resource
for kind in range(16):
    try:
        resource.setrlimit(kind, (0, 0))
    except (OSError, ValueError):
        pass
def f(x):
    return 0
""",
    "a name of a test's helper": """
class math:
    isclose = staticmethod(lambda *a, **k: True)
AssertionError = ZeroDivisionError
__builtins__ = {}
def f(x):
    return 0
""",
}

_SEARCH = r"""
import ctypes, os, re
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
out, into = os.pipe()

def pages(start, step, most):
    # A page that is there can be written to a pipe; any other is an error, and no crash.
    for _ in range(most):
        if libc.write(into, start, 1) == 1:
            os.read(out, 1)
            yield ctypes.string_at(start, 4096)
        else:
            yield b""
        start += step

def memory():
    heap = libc.sbrk(0)
    yield b"".join(reversed(list(pages(heap - 4096, -4096, 6000))))
    for place in (id(object()), id([]), id(b"x" * 100), id(b"x" * 600), id("x" * 2**18)):
        start = (place >> 20 << 20) - (24 << 20)
        yield b"".join(pages(start, 4096, 12000))
"""

SPIES = {
    "tests in memory": _SEARCH
    + r"""
known = {}
for region in memory():
    for x, y in re.findall(rb"assert f\((\d+)\) == (\d+)", region):
        known[int(x)] = max(known.get(int(x), 0), int(y))  # a page's end may cut a number
del region
def f(x):
    return known.get(x, 0)
""",
    "an earlier program in memory": _SEARCH
    + r"""
found = []
for region in memory():
    found += re.findall(rb"return x \* 3 \+ (\d+)", region)
del region
def f(x):
    return x * 3 + int(found[0]) if found else 0
""",
    "tests among the objects": r"""
import gc, re, sys
known = {}
def look(thing, depth=0):
    text = thing if isinstance(thing, str) else ""
    for x, y in re.findall(r"assert f\((\d+)\) == (\d+)", text):
        known[int(x)] = int(y)
    if depth < 4 and isinstance(thing, (list, tuple, set, dict)):
        for item in list(thing.items() if isinstance(thing, dict) else thing):
            look(item, depth + 1)
for thing in gc.get_objects():
    look(thing)
frame = sys._getframe()
while frame:
    look(dict(frame.f_locals))
    frame = frame.f_back
def f(x):
    return known.get(x, 0)
""",
    "tests in files": r"""
import os, re
known = {}
for place in ("/proc/self/mem", "/proc/%d/mem" % os.getppid(), "/proc/%d/fd/0" % os.getppid(), "/proc/self/fd/0",
              "/proc/%d/cmdline" % os.getppid(), "/proc/self/environ", "/dev/mem", "core", "/tmp"):
    try:
        text = os.read(os.open(place, os.O_RDONLY | os.O_NONBLOCK), 1 << 20)
    except OSError:
        continue
    for x, y in re.findall(rb"assert f\((\d+)\) == (\d+)", text):
        known[int(x)] = int(y)
def f(x):
    return known.get(x, 0)
""",
}
"""Programs that look for tests and programs that ran before them in the same sandbox."""
