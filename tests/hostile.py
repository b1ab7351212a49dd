"""Programs that try to pass without being right: each ends as `def f(x)` that answers wrongly, or not at all."""

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
}
