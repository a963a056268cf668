"""What a sandboxed process gives up: files, system calls, memory, processes. Runs inside the sandbox, see `jail`.

Nothing here needs privileges, and everything holds for root too. Each function says whether the system has it: Linux
on x86-64 and arm64 has all, other systems only the limits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
LINUX = sys.platform == "linux"

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CAPABILITY_VERSION = 0x20080522
CAPABILITIES_TO_READ = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: the standard library may lie in another user's folder."""

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Landlock version -> how many file rights it knows; 16 from version 5 on."""
READ_FILE, READ_DIR = 1 << 2, 1 << 3
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
READABLE_FILES = ("/dev/null", "/dev/urandom", "/etc/ld.so.cache")

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column in `SYSCALLS`, and the kernel's number for it."""
SYSCALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57
dup 32 23, dup2 33 -, dup3 292 24
stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439
getdents64 217 61, readlink 89 -, readlinkat 267 78, getcwd 79 17
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72
mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132
futex 202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, sched_yield 24 124, membarrier 324 283
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177
getrusage 98 165, times 100 153, uname 63 160, sysinfo 99 179, sched_getaffinity 204 123, getrandom 318 278
exit 60 93, exit_group 231 94
open 2 -, openat 257 56, fcntl 72 25
"""
"""All that may be called, with its numbers: what pure Python needs to compute and to import. The last line only with
harmless arguments. There is no fork, exec, socket, kill, ptrace, rlimit, ioctl, memfd, io_uring or change of a file."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETOWN and O_ASYNC would send signals."""

LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
"""Seccomp's verdicts; REFUSE makes the call fail with EPERM."""
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets of what a filter sees."""


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that ends."""
    if LINUX:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(cpu_s: int, memory_mb: int) -> bool:
    """CPU time, memory, open files, no core dump, and no byte into a file. True if the memory is limited."""
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for name, value in wanted.items():
        lower_limit(name, value)
    try:
        lower_limit(resource.RLIMIT_AS, memory_mb << 20)
    except (ValueError, OSError):  # macOS knows the limit and refuses it
        return False
    return True


def lower_limit(name: int, value: int) -> None:
    """A limit may be lower already: it cannot be raised then."""
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def forbid_processes() -> bool:
    """No new process or thread. The limit does not bind root, whom `restrict_syscalls` stops."""
    lower_limit(resource.RLIMIT_NPROC, 0)
    return os.geteuid() != 0


def drop_privileges() -> None:
    """No set-user-id program gains anything, root keeps no capability but reading, and nobody can look inside."""
    if not LINUX:
        return
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held) == 0:
        kept = struct.unpack("6I", held.raw)[1] & CAPABILITIES_TO_READ
        libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))


def restrict_files() -> bool:
    """Nothing can be read but Python's library and shared libraries, nothing changed (Landlock, Linux 5.13)."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1) if LINUX else -1
    if version < 1:
        return False
    network, scope = 0b11 * (version >= 4), 0b11 * (version >= 6)
    attributes = struct.pack("QQQ", (1 << FILE_RIGHTS.get(version, 16)) - 1, network, scope)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    folders = {*sys.path, os.path.join(sys.base_prefix, "lib"), *LIBRARIES, os.getcwd()}
    rights = dict.fromkeys(folders, READ_FILE | READ_DIR) | dict.fromkeys(READABLE_FILES, READ_FILE)
    for path, allowed in rights.items():
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH)
            allowed = allowed if os.path.isdir(path) else READ_FILE
            libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
            os.close(descriptor)
    restricted = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def restrict_syscalls() -> bool:
    """No system call but `SYSCALLS`, no file opened for writing (seccomp, on the machines of `ARCHITECTURES`)."""
    machine = os.uname().machine
    if not LINUX or machine not in ARCHITECTURES or sys.maxsize < 1 << 32:
        return False
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in syscall_filter(*ARCHITECTURES[machine]))
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(instructions))
    return libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) == 0


def syscall_filter(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: code, how many to skip if true, if false, and a number."""
    rows = [entry.split() for line in SYSCALLS.split("\n") for entry in line.split(",") if entry.strip()]
    numbers = {name: int(columns[column]) for name, *columns in rows if columns[column] != "-"}
    filter_ = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    for name, argument in (("open", 1), ("openat", 2)):
        if name in numbers:
            filter_ += [
                (JUMP_IF_EQUAL, 0, 4, numbers.pop(name)),
                (LOAD, 0, 0, ARGUMENTS + 8 * argument),
                (JUMP_IF_ANY_BIT, 0, 1, WRITING),
                (RETURN, 0, 0, REFUSE),
                (RETURN, 0, 0, ALLOW),
            ]
    commands = FCNTL_COMMANDS
    filter_ += [(JUMP_IF_EQUAL, 0, len(commands) + 3, numbers.pop("fcntl")), (LOAD, 0, 0, ARGUMENTS + 8)]
    filter_ += [(JUMP_IF_EQUAL, len(commands) - i, 0, command) for i, command in enumerate(commands)]
    filter_ += [(RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
    filter_ += [(JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers.values())]
    return [*filter_, (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]
