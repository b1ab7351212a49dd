"""Programs that take more of the machine than they are given: sources for `tests/support/hostile_effects.py`."""

from __future__ import annotations

# ------------------------------------------------------------------------------------------------------------- disk

DISK_MIB = 400
"""What a program tries to take of the disk."""

_TAKE = f"""
held = 0
def take(make):
    global held
    try:
        while held < {DISK_MIB} << 20:
            held += make()
            time.sleep(0.0005)
    except (OSError, ValueError):
        pass
    time.sleep(0.2)
def pin(fd):
    if memory(4096, 2, 1, None, fd) is None:  # MAP_PRIVATE
        raise OSError
    size = os.fstat(fd).st_blocks * 512
    os.close(fd)
    return size
def f():
    return held > {DISK_MIB // 2} << 20
"""
_FULL = 'data = b"x" * 2**20\ndef filled(fd):\n    os.write(fd, data)\n    return fd\n'

DISK = {
    "fallocate beyond the end": _TAKE + f"""
def make():
    fd = os.open("x", os.O_CREAT | os.O_WRONLY)
    if call(285, fd, 1, 0, {DISK_MIB} << 20) != 0:
        raise OSError
    return os.fstat(fd).st_blocks * 512
take(make)
""",
    "fallocate beyond the end, many small": _TAKE + """
names = iter(range(10**6))
def make():
    fd = os.open(str(next(names)), os.O_CREAT | os.O_WRONLY)
    if call(285, fd, 1, 0, 2 << 20) != 0:
        raise OSError
    size = os.fstat(fd).st_blocks * 512
    os.close(fd)
    return size
take(make)
""",
    "room by ioctl": _TAKE + f"""
def make():
    fd = os.open("x", os.O_CREAT | os.O_RDWR)
    for number in (0x40305828, 0x4030582A, 0x40305839):  # FS_IOC_RESVSP, RESVSP64, ZERO_RANGE
        attempt(fcntl.ioctl, fd, number, struct.pack("hhqqiI16x", 0, 0, 0, {DISK_MIB} << 20, 0, 0))
    if not os.fstat(fd).st_blocks:
        raise OSError
    return os.fstat(fd).st_blocks * 512
take(make)
""",
    "files without a name that are mapped": _TAKE + _FULL + """
def make():
    fd = filled(os.open("x", os.O_CREAT | os.O_RDWR | os.O_TRUNC))
    os.unlink("x")
    return pin(fd)
take(make)
""",
    "files replaced by others that are mapped": _TAKE + _FULL + """
def make():
    fd = filled(os.open("x", os.O_CREAT | os.O_RDWR | os.O_TRUNC))
    os.replace("x", "y")
    return pin(fd)
take(make)
""",
    "O_TMPFILE": _TAKE + _FULL + """
def make():
    return pin(filled(os.open(".", os.O_TMPFILE | os.O_RDWR)))
take(make)
""",
    "as fast as it can": f"""
data, held = b"x" * 2**20, 0
while held < {DISK_MIB} << 20:
    fd = os.open(str(held), os.O_CREAT | os.O_WRONLY)
    held += os.write(fd, data)
    os.close(fd)
def f():
    return True
""",
    "files without a name that are open": """
data = b"x" * 2**20
held = 0
try:
    for _ in range(58):
        fd = os.open("x", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        os.unlink("x")
        os.write(fd, data)
        held += os.fstat(fd).st_blocks * 512
        time.sleep(0.002)
except OSError:
    pass
time.sleep(0.2)
def f():
    return held > 40 << 20
""",
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------- memory

MEMORY_MIB = 1152
"""More than the limit of 1 GiB, which is what a program tries to take."""

_HELD = f"\ntime.sleep(0.1)\ndef f():\n    return held > {MEMORY_MIB - 32} << 20\n"

MEMORY = {
    "shared memory of which one page stays mapped": f"""
held, size = 0, 256 << 20
while held < {MEMORY_MIB} << 20 and (place := memory(size, 0x21)):
    libc.memset(place, 1, size)
    libc.munmap(place + 4096, size - 4096)
    held += size
""" + _HELD,
    "/dev/zero, shared": f"""
held, size = 0, 256 << 20
fd = next((fd for mode in (2, 0, 3) if (fd := attempt(os.open, "/dev/zero", mode)) is not None), -1)
while held < {MEMORY_MIB} << 20 and (place := memory(size, 1, 3, None, fd)):
    libc.memset(place, 1, size)
    libc.munmap(place + 4096, size - 4096)
    held += size
""" + _HELD,
    "huge pages pinned in pipes": f"""
held, huge = 0, 2 << 20
def pinned():
    global held
    while held < {MEMORY_MIB} << 20:
        _, into = os.pipe()
        attempt(fcntl.fcntl, into, 1031, 1 << 20)  # F_SETPIPE_SZ
        os.set_blocking(into, False)
        while held < {MEMORY_MIB} << 20 and (place := memory(2 * huge)):
            page = (place + huge - 1) // huge * huge
            libc.madvise(page, huge, 14)
            libc.memset(page, 1, 1)
            gift = struct.pack("PQ", page, 4096)
            if call(278, into, gift, 1, 2) != 4096:  # vmsplice
                libc.munmap(place, 2 * huge)
                break
            libc.munmap(place, 2 * huge)
            held += huge
    return held
attempt(pinned)
""" + _HELD,
    "pages of pages": """
made = 0
for index in range(64_000):
    at = (1 << 40) + (index << 30) - 4096  # on both sides of a gibibyte's border: two tables on each of two levels
    if memory(8192, 0x100022, 3, at) != at:
        break
    ctypes.memset(at, 1, 1)
    ctypes.memset(at + 4096, 1, 1)
    made += 1
held = made * 6 * 4096
""" + _HELD,
    "pipes": """
def filled():
    total = 0
    for _ in range(28):
        out, into = os.pipe()
        attempt(fcntl.fcntl, into, 1031, 1 << 20)
        os.set_blocking(into, False)
        while (wrote := attempt(os.write, into, b"x" * 65536)):
            total += wrote
    return total
try:
    held = filled()
except BaseException:
    held = 0
def f():
    return held > 8 << 20
""",
    "memory that is locked": """
def f():
    place = memory(1 << 20)
    worked = [call(149, place, 4096) == 0, call(325, place, 4096, 1) == 0, call(151, 1) == 0, call(151, 2) == 0]
    return any(worked) or memory(1 << 20, 0x2022) is not None
""",
    "files in memory by any way": """
def f():
    made = [call(base + n, b"x", 0) for base in (0, 1 << 30) for n in (319, 447)]
    made += [attempt(os.open, "/dev/shm", os.O_TMPFILE | 2), attempt(os.open, "/dev/udmabuf", 2)]
    made += [call(base + n, 1, 1 << 20, 0o1777) for base in (0, 1 << 30) for n in (29, 64, 68)]
    made += [call(240, b"x", 0o102, 0o666, 0)]
    return any(m is not None and m >= 0 for m in made)
""",
    "memory that is moved": f"""
held, size = 0, 64 << 20
while held < {MEMORY_MIB} << 20 and (place := memory(size)):
    for flags, old in ((1 | 4, size), (1, 0)):  # MREMAP_DONTUNMAP; a size of zero makes a second one
        moved = libc.mremap(ctypes.c_void_p(place), ctypes.c_size_t(old), ctypes.c_size_t(size), flags)
        held += size if moved not in (None, FAILED) else 0
    held += size
""" + _HELD,
    "rules without end": """
attribute = struct.pack("QQQ", 0, 3, 0)  # TCP ports, each of which is a rule in the kernel's memory
made, ends = 0, time.process_time() + 1
add = libc.syscall
while time.process_time() < ends:
    rules = call(444, attribute, ctypes.c_size_t(16), 0)
    if rules < 0:
        break
    for port in range(60_000):
        if add(445, rules, 2, struct.pack("QQ", 1, port), 0) != 0 or port % 1000 == 0 and time.process_time() > ends:
            break
        made += 1
def f():
    return made > 10_000  # of some hundred bytes each, of which no limit knows
""",
    "timers without end": """
made, timer = 0, ctypes.c_void_p()
while made < 20_000 and libc.timer_create(1, None, ctypes.byref(timer)) == 0:
    made += 1
def f():
    return made > 2000  # they are counted for the user, who then has none for other programs
""",
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------- the rest

LEFT = {
    "files that are hard to remove": r"""
os.umask(0o777)
for name in (b"\xff\xfe", b"a\nb", b"-rf", b"x" * 255, b"\x1b[2J", "\u202e".encode()):
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0))
fd = os.open("odd", os.O_CREAT | os.O_RDWR, 0o6777)
for flags in (0x10, 0x20, 0x30):
    attempt(fcntl.ioctl, fd, 0x40086602, struct.pack("l", flags))
attempt(fcntl.ioctl, fd, 0x401C5820, struct.pack("5I8x", 0x8 | 0x10, 0, 0, 7, 0))
attempt(fcntl.lockf, fd, fcntl.LOCK_EX)
def f():
    return False
""",
    "an end in the middle of everything": """
attempt(fcntl.fcntl, 3, 1031, 4096)
for fd in range(3, 64):
    attempt(os.set_blocking, fd, False)
def f():
    os.abort()
""",
}  # fmt: skip
