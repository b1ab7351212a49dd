"""Confine a process before it runs a program that a model wrote. Standard library only, Linux only.

Nothing here needs a privilege: resource limits, no_new_privs, Landlock (which files), seccomp (which system calls). A
process of root also becomes an unprivileged user. Each step raises `MissingProtectionError` where it cannot be taken;
nothing is skipped. This file is loaded by path into a bare interpreter: it imports nothing of soka_serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from functools import cache

NOBODY = 65534

MAX_MEMORY_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 20
MAX_OPEN_FILES = 64


class MissingProtectionError(Exception):
    """A protection that this machine does not give."""


# ------------------------------------------------------------------------------------------------------- limits


def limit_resources(cpu_s: int) -> None:
    """CPU seconds, memory, file size, open files, processes and core dumps; hard limits, so that none can be raised.

    Raises:
        MissingProtectionError: a limit cannot be set.
        OSError: this process has less than programs are promised, so that a right one could fail.
    """
    limits = {
        "RLIMIT_CPU": cpu_s,
        "RLIMIT_AS": MAX_MEMORY_BYTES,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 0,  # timers, which are counted per user; Linux has all of these
    }
    for name, most in ((getattr(resource, n), most) for n, most in limits.items() if hasattr(resource, n)):
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY and hard < most:
            raise OSError(f"the limit on {_LIMIT_NAMES[name]} is {hard}, expected at least {most}")
        try:
            resource.setrlimit(name, (most, most))
        except (OSError, ValueError) as error:
            raise MissingProtectionError(f"resource limits: {error}") from None


_LIMIT_NAMES = {
    resource.RLIMIT_CPU: "CPU seconds (ulimit -t)",
    resource.RLIMIT_AS: "bytes of memory (ulimit -v)",
    resource.RLIMIT_FSIZE: "bytes of a file (ulimit -f)",
    resource.RLIMIT_NOFILE: "open files (ulimit -n)",
}


# --------------------------------------------------------------------------------------------------------- user

_LIBC = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2
_LAST_CAPABILITY = 63


def die_with_parent() -> None:
    """End this process when the one that started it ends."""
    _prctl("parent death signal", _PR_SET_PDEATHSIG, 9)


def _prctl(what: str, *arguments: int) -> None:
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[1:5]]
    if _LIBC.prctl(ctypes.c_int(arguments[0]), *padded) != 0:
        raise MissingProtectionError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _set_capabilities(mask: int) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    if _LIBC.capset(header, data) != 0:
        raise MissingProtectionError(f"dropping capabilities: {os.strerror(ctypes.get_errno())}")


def leave_root() -> None:
    """Become an unprivileged user without capabilities, if this is root.

    One is kept where Python itself lies in a folder that only root may enter: reading files regardless of their mode.
    Landlock still says which files those are.
    """
    if os.geteuid() != 0:
        _set_capabilities(0)
        return
    for capability in range(_LAST_CAPABILITY + 1):
        # EINVAL ends the list of capabilities that this kernel has.
        if _LIBC.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            break
    _prctl("keeping capabilities over a change of user", _PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise MissingProtectionError(f"leaving root: {error}") from None
    readable = all(os.access(folder, os.R_OK | os.X_OK) for folder in _library_folders())
    _set_capabilities(0 if readable else 1 << _CAP_DAC_READ_SEARCH)
    if os.geteuid() == 0:
        raise MissingProtectionError("leaving root: still root")


# ------------------------------------------------------------------------------------------------------ Landlock

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_MAKE_REG, _TRUNCATE = 1 << 8, 1 << 14
_FILE_RIGHTS = _WRITE_FILE | _READ_FILE | _TRUNCATE

_HANDLED_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every right on files that an ABI version knows: what is not granted below is refused."""

_READABLE_FILES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/etc/localtime", "/etc/ld.so.cache")
_READABLE_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
"""Shared libraries that Python's own modules are linked against, and time zones."""


@cache
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths["stdlib"], paths["platstdlib"]}
    folders |= {folder for folder in sys.path if folder.endswith("lib-dynload")}
    # A Python that was built with a shared libpython has it here.
    libdir = sysconfig.get_config_var("LIBDIR")
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")
    return tuple(sorted(folders | ({str(libdir)} if libdir and shared else set())))


def prepare() -> None:
    """Look up once what every lock needs, before processes are forked."""
    _library_folders()


def landlock_version() -> int:
    """Version of Landlock in this kernel; 0 without it."""
    return max(0, int(_LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def confine_files() -> None:
    """Let files be read where Python lies, and plain files be made in the current directory; no more, and no TCP."""
    version = landlock_version()
    if version < 1:
        raise MissingProtectionError("Landlock: this kernel does not have it (Linux 5.13 or newer, with it enabled)")
    handled = _HANDLED_BY_ABI[min(version, max(_HANDLED_BY_ABI))]
    network = 3 if version >= 4 else 0
    scoped = 3 if version >= 6 else 0  # signals and abstract sockets to processes outside
    attributes = struct.pack("=QQQ", handled, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise MissingProtectionError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    try:
        for folder in (*_library_folders(), *_READABLE_FOLDERS):
            _allow(ruleset, folder, _READ_FILE | _READ_DIR)
        for file in _READABLE_FILES:
            _allow(ruleset, file, _READ_FILE)
        _allow(ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
        # No folders, links, sockets or pipes: the scratch directory stays flat, and is quickly emptied. Nothing is
        # removed or renamed: a file without a name would still take the disk, and could not be counted.
        own = _READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE_REG | _TRUNCATE
        # By the current directory: the folders above it may be ones that this user cannot enter.
        _allow(ruleset, os.curdir, own & handled, needed=True)
        if _LIBC.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            raise MissingProtectionError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int, *, needed: bool = False) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if needed:
            raise MissingProtectionError(f"Landlock: {path}: {error}") from None
        return
    try:
        rule = struct.pack("=Qi", rights, place)
        if _LIBC.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) != 0:
            raise MissingProtectionError(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(place)


# ------------------------------------------------------------------------------------------------------- seccomp

# Numbers of refused system calls: (x86-64, aarch64); None where the architecture does not have the call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes: none is made, none is signalled, none is looked into
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "setpgid": (109, 154), "setsid": (112, 157), "prctl": (157, 167), "setpriority": (141, 140),
    "sched_setaffinity": (203, 122), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211),
    "recvmsg": (47, 212), "sendmmsg": (307, 269), "recvmmsg": (299, 243),
    # identity and namespaces
    "unshare": (272, 97), "setns": (308, 268), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "setfsuid": (122, 151), "setfsgid": (123, 152), "capset": (126, 91),
    # what Landlock does not cover: attributes of files, truncation by path, handles, roots, mounts
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11),
    "llistxattr": (195, 12), "flistxattr": (196, 13), "fanotify_mark": (301, 263), "quotactl_fd": (443, 443),
    "uselib": (134, None), "swapoff": (168, 225),
    # rules that the kernel keeps, without end
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "truncate": (76, 45), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "openat2": (437, 437),
    "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40), "umount2": (166, 39), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "fanotify_init": (300, 262), "inotify_init1": (294, 26),
    "inotify_init": (253, None), "inotify_add_watch": (254, 27),
    # disk and memory past the limits: blocks beyond a file's end, pages that stay in a pipe when they are unmapped
    "fallocate": (285, 47), "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77), "sendfile": (40, 71),
    "sync": (162, 81), "syncfs": (306, 267),
    "mknod": (133, None), "mknodat": (259, 33), "flock": (73, 32), "quotactl": (179, 60), "swapon": (167, 224),
    # memory and messages that the limits do not count
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # the kernel's other doors
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_setup": (206, 0), "io_submit": (209, 2), "remap_file_pages": (216, 234),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "personality": (135, 92),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "lookup_dcookie": (212, 18), "nfsservctl": (180, 42),
    "seccomp": (317, 277),
}  # fmt: skip
_CLONE3 = 435
_UNKNOWN_FROM = 451
"""Calls from here on are newer than this list, and refused (cachestat, listmount): Python 3.11-3.13 needs none."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_PRLIMIT = (302, 261)
_OPEN_CALLS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open and openat, and which argument the flags are
_O_ACCMODE, _O_TRUNC = 3, 0o1000
_O_TMPFILE = 0o20000000  # a file without a name

_MMAP = (9, 222)
_MAP_TYPE, _MAP_PRIVATE = 0x0F, 2
_FCNTL, _IOCTL = (72, 25), (16, 29)
_FCNTL_ALLOWED = (0, 1, 2, 3, 4, 1030, 1032)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Among the others are F_SETOWN and
F_SETSIG, which send signals to any process of the user, locks on files of others, and larger pipes."""
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Among the others is FS_IOC_RESVSP, an fallocate."""

_LD_ABS, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, constant)."""
    column, arch = _ARCHITECTURES[machine]
    code: list[tuple[int, int, int, int]] = [
        (_LD_ABS, 0, 0, 4),
        (_JEQ, 1, 0, arch),
        (_RET, 0, 0, _KILL),  # another architecture's calls have other numbers
        (_LD_ABS, 0, 0, 0),
        (_JGE, 0, 1, _UNKNOWN_FROM),  # also the x32 calls, whose numbers start at 2**30
        (_RET, 0, 0, _ENOSYS),
        (_JEQ, 0, 1, _CLONE3),
        (_RET, 0, 0, _ENOSYS),
    ]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            code += [(_JEQ, 0, 1, number), (_RET, 0, 0, _EPERM)]
    # Limits of other processes.
    code += [(_JEQ, 0, 4, _PRLIMIT[column]), (_LD_ABS, 0, 0, 16), (_JEQ, 1, 0, 0), (_RET, 0, 0, _EPERM)]
    code += [(_RET, 0, 0, _ALLOW)]
    for numbers, allowed in ((_FCNTL, _FCNTL_ALLOWED), (_IOCTL, _IOCTL_ALLOWED)):
        code += [(_JEQ, 0, 2 * len(allowed) + 2, numbers[column]), (_LD_ABS, 0, 0, 16 + 8)]
        for command in allowed:
            code += [(_JEQ, 0, 1, command), (_RET, 0, 0, _ALLOW)]
        code += [(_RET, 0, 0, _EPERM)]
    # Shared memory stays as a whole for as long as one page of it is mapped, and the limit counts that page only.
    code += [(_JEQ, 0, 5, _MMAP[column]), (_LD_ABS, 0, 0, 16 + 8 * 3), (_AND, 0, 0, _MAP_TYPE)]
    code += [(_JEQ, 1, 0, _MAP_PRIVATE), (_RET, 0, 0, _EPERM), (_RET, 0, 0, _ALLOW)]
    # Landlock does not see a file that is opened for neither reading nor writing (access mode 3), and opening to read
    # with truncation would empty a file that it lets be read.
    for number, argument in _OPEN_CALLS[machine]:
        code += [
            (_JEQ, 0, 9, number),
            (_LD_ABS, 0, 0, 16 + 8 * argument),
            (_JSET, 0, 1, _O_TMPFILE),
            (_RET, 0, 0, _EPERM),
            (_AND, 0, 0, _O_ACCMODE | _O_TRUNC),
            (_JEQ, 2, 0, _O_ACCMODE),
            (_JEQ, 1, 0, _O_ACCMODE | _O_TRUNC),
            (_JEQ, 0, 1, os.O_RDONLY | _O_TRUNC),
            (_RET, 0, 0, _EPERM),
            (_RET, 0, 0, _ALLOW),
        ]
    return [*code, (_RET, 0, 0, _ALLOW)]


def refuse_system_calls() -> None:
    """Refuse processes, sockets, signals and what else the list names, for this process and for good."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise MissingProtectionError(f"seccomp: written for {', '.join(_ARCHITECTURES)}; this machine is {machine}")
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _program(machine))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    address = ctypes.create_string_buffer(header, len(header))
    if _LIBC.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), address, 0, 0) != 0:
        raise MissingProtectionError(f"seccomp: {os.strerror(ctypes.get_errno())}")


# ----------------------------------------------------------------------------------------------------------- all


def lock(scratch: str, cpu_s: int, *, weak: bool) -> None:
    """Apply all protections, in the one order that works. `weak`: resource limits only, which a person must have
    allowed.

    Raises:
        MissingProtectionError: one of them cannot be had here.
    """
    if weak:
        with contextlib.suppress(MissingProtectionError):
            limit_resources(cpu_s)
        return
    if sys.platform != "linux":
        raise MissingProtectionError(f"Landlock and seccomp: they are Linux's; this is {sys.platform}")
    die_with_parent()
    os.chdir(scratch)
    leave_root()
    # A change of user clears the signal.
    die_with_parent()
    # A limit of 0 on core dumps does not stop those that the system hands to a program of its own.
    _prctl("no core dumps", _PR_SET_DUMPABLE, 0)
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    limit_resources(cpu_s)
    confine_files()
    refuse_system_calls()
