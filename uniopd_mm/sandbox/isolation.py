"""The child's side of isolation: resource limits, namespaces, a file tree of its own, Landlock.

Runs in a fresh interpreter that holds nothing of ours; standard library only, system calls through ``ctypes``.  Needs
Linux 5.13 for all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK = 442, 444  # the same on every architecture
_PDEATHSIG, _SET_DUMPABLE, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 24, 36, 38

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_TEMP_BYTES, _TEMP_FILES = 32 << 20, 1000
_N_TASKS = 64
"""Processes and threads of one program."""
_N_OPEN_FILES = 64
_STACK_BYTES = 100 << 20
_UNUSED_UID = 0x70000000


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _prctl(option: int, value: int) -> int:
    return _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def adopt_orphans() -> None:
    """Processes whose parent ended become children of this one, so that it can end them (level 1)."""
    _check(_prctl(_SUBREAPER, 1), "subreaper")


def go_first_when_memory_runs_out() -> None:
    """The kernel ends programs before anything else: many small ones can take more than the limit of one."""
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def die_with_parent() -> None:
    _check(_prctl(_PDEATHSIG, signal.SIGKILL), "parent death signal")


def forbid_tracing() -> None:
    """No process without privileges can look into this one or take it over."""
    _check(_prctl(_SET_DUMPABLE, 0), "dumpable")


# -- namespaces ---------------------------------------------------------------------------------------------------------
def enter_namespaces(readable: Sequence[str], hidden: Sequence[str], temp: str) -> int | None:
    """Leave the machine's processes (from the next fork on), network and files; the user id for programs.

    ``readable`` are the only outside paths in the new file tree, read-only and without the directories ``hidden``;
    ``temp`` is an empty directory in memory.
    Root keeps its user namespace and gives programs an unused user id; anyone else, and root where files of Python are not
    for all, gets a user namespace (None: programs keep the id and lose every capability).
    """
    spaces = _NEWNS | _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    uid = _unused_uid() if os.geteuid() == 0 and os.stat(os.__file__).st_mode & 0o004 else None
    if uid is None or _libc.unshare(spaces) < 0:
        uid = None
        _enter_user_namespace(spaces)
    _build_tree(readable, hidden, temp)
    return uid


def _enter_user_namespace(spaces: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEWUSER | spaces), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _unused_uid() -> int | None:
    """A user id that no one has; different for sandboxes side by side, so that they do not share the task limit."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        n_mapped = max(int(first) + int(n) for first, _, n in (line.split() for line in file))
    if n_mapped > _UNUSED_UID + (1 << 22):
        return _UNUSED_UID + os.getpid()
    return 60100 + os.getpid() % 5000 if n_mapped > 65200 else None


def _build_tree(readable: Sequence[str], hidden: Sequence[str], temp: str) -> None:
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    paths = [path for path in (*readable, *DEVICES) if os.path.exists(path)]
    # Opened first: the new root is laid over a directory that some of them may be in.
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in paths]
    base = "/tmp"
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path, fd in sources:
        _bind(fd, base + path, read_only=path not in DEVICES)
        os.close(fd)
    for path in hidden:
        if os.path.isdir(base + path):
            _mount("tmpfs", base + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")
            _set_attributes(base + path, _ATTR_RDONLY, recursive=False)
    os.makedirs(base + temp, exist_ok=True)
    _mount_temp(base + temp)
    with contextlib.suppress(OSError):  # shared memory and semaphores of multiprocessing
        os.symlink(temp, base + "/dev/shm")
    old = base + "/old"
    os.mkdir(old)
    _check(_libc.pivot_root(base.encode(), old.encode()), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", _MNT_DETACH), "umount")
    os.rmdir("/old")
    _set_attributes("/", _ATTR_RDONLY, recursive=False)
    os.chdir(temp)


def _mount_temp(path: str) -> None:
    options = f"size={_TEMP_BYTES},nr_inodes={_TEMP_FILES},mode=1777"
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def renew_temp(path: str) -> None:
    """An empty directory in place of one that programs wrote in; its contents may be anything, so they are not looked at."""
    os.chdir("/")
    _check(_libc.umount2(path.encode(), _MNT_DETACH), f"umount {path}")
    _mount_temp(path)


def _bind(fd: int, target: str, read_only: bool) -> None:
    source = f"/proc/self/fd/{fd}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _mount(source, target, None, _MS_BIND | _MS_REC)
    if read_only:
        _set_attributes(target, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [text.encode() if text is not None else None for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mount {target}")


def _set_attributes(target: str, attributes: int, recursive: bool) -> None:
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        target.encode(),
        ctypes.c_uint(flags),
        ctypes.byref(request),
        ctypes.c_size_t(ctypes.sizeof(request)),
    )
    _check(result, f"mount_setattr {target}")


# -- Landlock -----------------------------------------------------------------------------------------------------------
class _RulesetAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scoped")]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("fd", ctypes.c_int32)]


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TRUNCATE = 1 << 14


def landlock_abi() -> int:
    """Version of Landlock that the kernel offers; 0 = none."""
    return max(0, _landlock(0, None, 0, 1))


def _landlock(call: int, *arguments: object) -> int:
    return _libc.syscall(ctypes.c_long(_SYS_LANDLOCK + call), *arguments)


def landlock_rules(readable: Sequence[str], temp: str) -> int:
    """A rule set (file descriptor): read ``readable``, write only in ``temp``; no TCP, no signal or socket to outside."""
    abi = landlock_abi()
    n_file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    everything = (1 << n_file_rights) - 1
    attr = _RulesetAttr(everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = _check(_landlock(0, ctypes.byref(attr), ctypes.c_size_t(size), 0), "landlock")
    for path in readable:
        _allow(rules, path, _READ)
    for path in DEVICES:
        _allow(rules, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & everything)
    # Temporary files need no execution, devices, or hard links to elsewhere.
    _allow(rules, temp, everything & ~_EXECUTE)
    return rules


def _allow(rules: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        rights &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
    rule = _PathRule(rights, fd)
    _check(_landlock(1, ctypes.c_int(rules), ctypes.c_int(1), ctypes.byref(rule), 0), f"landlock {path}")
    os.close(fd)


# -- the program's own process ------------------------------------------------------------------------------------------
def limit_resources(memory_bytes: int, cpu_s: float, file_bytes: int, count_tasks: bool) -> None:
    """Limits that the program cannot raise.  ``count_tasks``: its user id has other processes as well."""
    tasks = _N_TASKS + (_tasks_of_user() if count_tasks else 0)
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(cpu_s) + 1,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: _N_OPEN_FILES,
        resource.RLIMIT_NPROC: tasks,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (value, value))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))  # deep recursion is common in right solutions


def _tasks_of_user() -> int:
    n = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                n += len(os.listdir(f"/proc/{name}/task"))
    return n


def drop_privileges(uid: int | None, rules: int | None) -> None:
    """Become ``uid`` (if given), lose all capabilities, gain none back by executing files, obey the ``rules``."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        for capability in range(64):
            _prctl(_CAPBSET_DROP, capability)
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        _check(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "capset")
    _check(_prctl(_NO_NEW_PRIVS, 1), "no_new_privs")
    if rules is not None:
        _check(_landlock(2, ctypes.c_int(rules), 0), "landlock")
