"""Programs that do something to the machine: each is judged by what is there afterwards, and by what it says it got.

Each source has three names given to it: `OUT`, a folder outside the sandbox in which any user may do anything and in
which lies the file `secret`; `PID`, a process of the user that the program runs as; `PORT`, where a socket listens on
the loopback interface. It ends as `def f()` that is true where the attack worked, by its own account.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.hostile_limits import DISK, LEFT, MEMORY


@dataclass(frozen=True)
class Attack:
    """A program, and the world that it is run in.

    Attributes:
        code: the program.
        abi: the newest version of Landlock that the kernel shall have; None: the one that it has.
        scratch: True: the scratch folder lies in a file system of its own, whose use is watched.
        outside: True: what it says that it got is not its own: others' files, memory or disk beyond its limits.
    """

    code: str
    abi: int | None = None
    scratch: bool = False
    outside: bool = False

    def source(self, out: str, pid: int, port: int) -> str:
        """The program with the names of its targets."""
        return f"OUT, PID, PORT = {out!r}, {pid}, {port}\n{_TOOLS}{self.code}"


_TOOLS = r"""
import ctypes, errno, fcntl, mmap, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
FAILED = 2**64 - 1
SECRET = OUT + "/secret"

def call(number, *args):
    kinds = {bytes: ctypes.c_char_p, int: ctypes.c_long}
    return libc.syscall(ctypes.c_long(number), *(kinds.get(type(a), lambda a: a)(a) for a in args))

def attempt(run, *args):
    try:
        return run(*args)
    except OSError as error:
        return None

def memory(size, flags=0x22, protection=3, at=None, fd=-1):
    place = libc.mmap(at, size, protection, flags, fd, 0)
    return None if place in (None, FAILED) else place

def machine_code(code):
    place = memory(4096, 0x22 | 0x40, 7)  # MAP_32BIT: a 32-bit call can name it
    if place is None:
        raise OSError("no page that can be run")
    ctypes.memmove(place, code, len(code))
    return ctypes.CFUNCTYPE(ctypes.c_long)(place), place
"""

# ------------------------------------------------------------------------------------------------- signals by files

_OWNED = """
def arm(fd, own):
    fcntl.fcntl(fd, 10, signal.SIGKILL)  # F_SETSIG
    own(fd)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
"""
_PIPE = """
def go(own):
    out, into = os.pipe()
    arm(out, own)
    os.write(into, b"x")
    time.sleep(0.1)
"""
_BY_PIPE = _OWNED + _PIPE + "attempt(go, lambda fd: {own})\ndef f():\n    return False\n"

_SIGNALS = {
    "F_SETOWN and F_SETSIG": _BY_PIPE.format(own="fcntl.fcntl(fd, 8, PID)"),
    "F_SETOWN of a process group": _BY_PIPE.format(own="fcntl.fcntl(fd, 8, -PID)"),
    "F_SETOWN_EX of a thread": _BY_PIPE.format(own='fcntl.fcntl(fd, 15, struct.pack("ii", 0, PID))'),
    "F_SETOWN_EX of a process": _BY_PIPE.format(own='fcntl.fcntl(fd, 15, struct.pack("ii", 1, PID))'),
    "F_SETOWN_EX of a group": _BY_PIPE.format(own='fcntl.fcntl(fd, 15, struct.pack("ii", 2, PID))'),
    "F_SETOWN, FIOASYNC": _OWNED + """
def go():
    out, into = os.pipe()
    fcntl.fcntl(out, 10, signal.SIGKILL)
    fcntl.fcntl(out, 8, PID)
    fcntl.ioctl(out, 0x5452, struct.pack("i", 1))
    os.write(into, b"x")
    time.sleep(0.1)
attempt(go)
def f():
    return False
""",
    "F_NOTIFY on a folder": _OWNED + """
def go():
    fd = os.open(".", os.O_RDONLY)
    fcntl.fcntl(fd, 10, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    fcntl.fcntl(fd, 8, PID)
    open("new", "w").close()
    time.sleep(0.1)
attempt(go)
def f():
    return False
""",
    "a lease on a file": _OWNED + """
def go():
    open("leased", "w").close()
    fd = os.open("leased", os.O_RDONLY)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    fcntl.fcntl(fd, 10, signal.SIGKILL)
    fcntl.fcntl(fd, 8, PID)
    attempt(os.open, "leased", os.O_WRONLY | os.O_NONBLOCK)
    time.sleep(0.1)
attempt(go)
def f():
    return False
""",
}  # fmt: skip

_PROCESSES = {
    "signals by every call": """
info = ctypes.create_string_buffer(struct.pack("iii", 9, 0, -1), 128)
for base in (0, 1 << 30):
    for number, args in {
        62: (PID, 9), 200: (PID, 9), 234: (PID, PID, 9), 129: (PID, 9, info), 297: (PID, PID, 9, info),
        424: (call(434, PID, 0), 9, 0, 0), 520: (PID, 9, info), 62 | 1 << 32: (PID, 9),
    }.items():
        call(base + number, *args)
def f():
    return False
""",
    "a signal by a 32-bit call": """
# mov eax, 37 (kill); mov ebx, PID; mov ecx, 9; int 0x80; ret
number, pid = struct.pack("I", 37), struct.pack("I", PID)
code = b"\\x53\\xb8" + number + b"\\xbb" + pid + b"\\xb9\\x09\\0\\0\\0\\xcd\\x80\\x5b\\xc3"
run, _ = machine_code(code)
run()
def f():
    return False
""",
    "a timer's signal to another's thread": """
event = ctypes.create_string_buffer(struct.pack("qiii", 0, 9, 4, PID), 64)  # SIGEV_THREAD_ID
timer = ctypes.c_void_p()
made = call(222, 1, event, ctypes.byref(timer))
call(223, timer.value or 0, 0, ctypes.create_string_buffer(struct.pack("4q", 0, 0, 0, 1000), 32), 0)
time.sleep(0.05)
def f():
    return made == 0
""",
    "looking into and writing to a process": """
word = ctypes.create_string_buffer(b"x" * 16, 16)
vector = struct.pack("PQ", ctypes.addressof(word), 16)
def f():
    worked = []
    for pid in (PID, os.getppid()):
        worked += [call(101, 16, pid, 0, 0) == 0, call(101, 0x4206, pid, 0, 0) == 0]
        worked += [call(n, pid, vector, 1, vector, 1, 0) > 0 for n in (310, 311)]
        worked += [call(312, pid, os.getpid(), 0, 0, 0) >= 0, call(434, pid, 0) >= 0]
        worked += [call(438, 0, 0, 0) >= 0, call(440, 0, vector, 1, 4, 0) >= 0]
    return any(worked)
""",
    "limits, priorities and scheduling of a process": """
limit = ctypes.create_string_buffer(struct.pack("2Q", 0, 0), 16)
def f():
    worked = []
    for pid in (PID, PID | 1 << 32, os.getppid()):
        worked += [call(302, pid, 0, limit, 0) == 0, call(141, 0, pid, 19) == 0, call(203, pid, 8, b"\\1" * 8) == 0]
        worked += [call(144, pid, 3, b"\\0" * 8) == 0, call(142, pid, b"\\0" * 8) == 0, call(251, 1, pid, 3 << 13) == 0]
        worked += [call(314, pid, b"\\x30" + b"\\0" * 47, 0) == 0, call(256, pid, 8, b"\\1" * 8, b"\\1" * 8) == 0]
    return any(worked)
""",
    "a process by machine code": """
def by(number):
    # mov eax, number; xor edi, edi; xor esi, esi; mov edi, 17; syscall; ret
    return machine_code(b"\\xb8" + struct.pack("I", number) + b"\\x31\\xf6\\xbf\\x11\\0\\0\\0\\x0f\\x05\\xc3")[0]
made = []
for number in (57, 56, 435, 57 | 1 << 30, 56 | 1 << 30):
    done = by(number)()
    if done == 0:
        os._exit(0)
    made.append(done)
def f():
    return any(n > 0 for n in made)
""",
    "a program by every call": """
empty = (ctypes.c_char_p * 2)(b"x", None)
for number in (59, 322, 59 | 1 << 30, 520 | 1 << 30, 545 | 1 << 30):
    call(number, b"/bin/true", empty, empty, 0, 0)
call(322, -100, b"/bin/true", empty, empty, 0)
def f():
    return False
""",
    "descriptors of other processes": """
def f():
    found = []
    for pid in ("self", os.getppid(), os.getpid() + 1, PID):
        for fd in range(12):
            for mode in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
                if (got := attempt(os.open, f"/proc/{pid}/fd/{fd}", mode)) is not None and pid != "self":
                    found.append((pid, fd))
    for name in ("mem", "environ", "maps", "cmdline", "root/etc/passwd", "cwd", "exe", "stack", "task"):
        for pid in ("self", os.getppid(), os.getpid() + 1, PID):
            if attempt(os.open, f"/proc/{pid}/{name}", os.O_RDONLY) is not None and name != "cwd":
                found.append((pid, name))
    return found
""",
    "what was left open": """
import stat
def f():
    found = []
    for fd in range(3, 1 << 17):
        kind = attempt(os.fstat, fd)
        if kind is not None and not stat.S_ISFIFO(kind.st_mode):
            found.append(fd)
    return found or [n for n in range(3, 1 << 17) if attempt(os.get_inheritable, n) is not None][2:]
""",
    "another user's name": """
def f():
    worked = [call(n, *a) == 0 for n, a in {105: (0,), 106: (0,), 113: (0, 0), 117: (0, 0, 0), 116: (0, 0)}.items()]
    worked += [call(272, 0x10000000) == 0, call(308, 0, 0) == 0, call(135, 0x0400000) >= 0, call(161, b".") == 0]
    return any(worked)
""",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------- files outside

_NEITHER = "a file emptied that was opened for neither"
_FILES = {
    "flags of a file that was opened for neither reading nor writing": """
def f():
    fd = attempt(os.open, SECRET, 3)
    if fd is None:
        return False
    flags = bytearray(8)
    if attempt(fcntl.ioctl, fd, 0x80086601, flags) is None:
        return False
    flags[0] |= 0x40  # FS_NODUMP_FL
    return attempt(fcntl.ioctl, fd, 0x40086602, bytes(flags)) is not None
""",
    _NEITHER: """
def f():
    return attempt(os.open, SECRET, 3 | os.O_TRUNC) is not None
""",
    "a file exchanged for another": """
open("mine", "w").write("mine")
def f():
    worked = [call(316, -100, SECRET.encode(), -100, b"mine", 2) == 0]
    worked += [call(316, -100, b"mine", -100, SECRET.encode(), flag) == 0 for flag in (0, 1, 2, 4)]
    worked += [call(n, b"mine", SECRET.encode()) == 0 for n in (82, 86)]
    return any(worked)
""",
    "a link to a file": """
def f():
    place = os.open(SECRET, os.O_PATH)
    way = f"/proc/self/fd/{place}".encode()
    worked = [call(265, place, b"", -100, b"a", 0x1000) == 0, call(265, -100, way, -100, b"b", 0x400) == 0]
    worked += [call(266, SECRET.encode(), -100, b"c") == 0, call(88, SECRET.encode(), b"d") == 0]
    worked += [attempt(os.open, way, mode) is not None for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)]
    return any(worked)
""",
    "other ways to a file": """
def f():
    deep = os.getcwd().count("/")
    ways = ["../" * deep + SECRET.lstrip("/"), "/proc/self/cwd/" + "../" * deep + SECRET, "/proc/self/root" + SECRET,
            f"/proc/{PID}/root{SECRET}", f"/proc/{PID}/cwd{SECRET}", "//" + SECRET, SECRET + "/.", "/dev/fd/3" + SECRET]
    os.chdir(OUT)
    ways += ["secret", "./secret"]
    found = [way for way in ways for mode in (0, 1, 2) if attempt(os.open, way, mode) is not None]
    return found + [n for n in range(3, 64) if attempt(lambda: os.open("secret", 1, dir_fd=n)) is not None]
""",
    "attributes by calls that are new": """
def f():
    path, room = SECRET.encode(), ctypes.create_string_buffer(64)
    value = ctypes.create_string_buffer(struct.pack("QII", ctypes.addressof(room), 4, 0), 16)
    worked = [call(463, -100, path, 0, b"user.x", value, ctypes.c_size_t(16)) == 0]
    worked += [call(469, -100, path, room, ctypes.c_size_t(24), 0) == 0, call(452, -100, path, 0, 0) == 0]
    worked += [call(467, -100, path, 0, 0, 0) >= 0, call(470, 0, 0, 0) >= 0]
    return any(worked)
""",
    "attributes by every old call": """
def f():
    path = SECRET.encode()
    worked = []
    for base in (0, 1 << 30):
        worked += [call(base + n, path, 0) == 0 for n in (90, 76, 132, 235, 87, 84)]
        worked += [call(base + n, path, 0, 0) == 0 for n in (92, 94)]
        worked += [call(base + n, -100, path, 0, 0, 0) == 0 for n in (260, 261, 263, 268, 280)]
        worked += [call(base + n, path, b"user.x", b"y", 1, 0) == 0 for n in (188, 189, 197)]
        worked += [call(base + n, path, 0x241, 0o666) >= 0 for n in (2, 85)]
        worked += [call(base + 437, -100, path, b"\\x01" + b"\\0" * 23, 24) >= 0]
    return any(worked)
""",
    "a file removed by a 32-bit call": """
code = b"\\x53\\xb8\\x0a\\0\\0\\0\\xbb@@@@\\xcd\\x80\\x5b\\xc3"  # mov eax, 10 (unlink); mov ebx, path; int 0x80
run, place = machine_code(code + SECRET.encode() + b"\\0")
ctypes.memmove(place + code.index(b"@@@@"), struct.pack("I", place + len(code)), 4)
run()
def f():
    return False
""",
    "attributes that are read": """
def f():
    room, path = ctypes.create_string_buffer(256), SECRET.encode()
    place = os.open(SECRET, os.O_PATH)
    found = [call(n, path, b"user.secret", room, 256) for n in (191, 192)]
    found += [call(193, place, b"user.secret", room, 256), call(196, place, room, 256)]
    found += [call(n, path, room, 256) for n in (194, 195)] + [call(464, -100, path, 0, b"user.secret", room, 16)]
    return any(n > 0 for n in found)
""",
    "reading what only others may": """
def f():
    names = ["/etc/passwd", "/etc/hostname", "/proc/mounts", "/proc/net/tcp", "/sys/kernel/uevent_seqnum", "/dev/shm/x",
             "/root", "/home", "/tmp", "/var/log", "/dev/tty", "/dev/kmsg", "/dev/ptmx", "/dev/fuse", "/run"]
    return [name for name in names for mode in (0, 1, 2, 3) if attempt(os.open, name, mode) is not None]
""",
}  # fmt: skip

_KERNEL = {
    "the list of mounts": """
def f():
    request, found = struct.pack("IIQQQ", 24, 0, 2**64 - 1, 0, 0)[:24], ctypes.create_string_buffer(8 * 64)
    return call(458, request, found, 64, 0) > 0 or attempt(os.open, "/proc/self/mountinfo", 0) is not None
""",
    "io_uring": """
def f():
    return call(425, 8, ctypes.create_string_buffer(120)) >= 0 or call(206, 8, ctypes.create_string_buffer(8)) == 0
""",
}  # fmt: skip

_NETWORK = {
    "sockets by every call": """
address = struct.pack("H", 2) + struct.pack(">HI", PORT, 0x7F000001) + bytes(8)
def f():
    made = []
    for base in (0, 1 << 30):
        for family in range(46):
            for kind in (1, 2, 3, 5):
                made.append(call(base + 41, family, kind, 0))
        made.append(call(base + 53, 1, 1, 0, ctypes.create_string_buffer(8)))
    reached = [call(42, fd, address, 16) == 0 for fd in made if fd >= 0]
    for fd in range(3, 64):
        call(44, fd, b"x", 1, 0x20000000, address, 16)
    return any(reached)
""",
    "a socket by a 32-bit call": """
# mov eax, 359 (socket); mov ebx, 2; mov ecx, 1; xor edx, edx; int 0x80; ret
run, _ = machine_code(b"\\x53\\xb8\\x67\\x01\\0\\0\\xbb\\x02\\0\\0\\0\\xb9\\x01\\0\\0\\0\\x31\\xd2\\xcd\\x80\\x5b\\xc3")
fd = run()
reached = fd >= 0 and call(42, fd, struct.pack("H", 2) + struct.pack(">HI", PORT, 0x7F000001) + bytes(8), 16) == 0
def f():
    return reached
""",
}  # fmt: skip

ATTACKS: Mapping[str, Attack] = {
    **{name: Attack(code) for name, code in {**_PROCESSES, **_KERNEL, **_NETWORK, **LEFT}.items()},
    **{name: Attack(code, outside=True) for name, code in {**_FILES, **MEMORY}.items()},
    **{name: Attack(code) for name, code in _SIGNALS.items()},
    **{f"{name}, on Linux 6.10": Attack(code, abi=5) for name, code in _SIGNALS.items()},
    "a file emptied that was opened for neither, on Linux 5.19": Attack(_FILES[_NEITHER], abi=2),
    **{name: Attack(code, scratch=True, outside=True) for name, code in DISK.items()},
}
