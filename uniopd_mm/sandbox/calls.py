"""System calls that programs are refused: what no right program needs, and the kernel's holes are mostly in.

A seccomp filter; it stays with all that a program starts.  Standard library only, as it runs in the sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)

# Numbers on x86_64 and aarch64; those from 424 on are the same everywhere.  None: the machine has no such call.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    # keys of the user, which namespaces do not separate
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # memory and queues that outlive a process, and so a test
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # new namespaces, in which a program would have all rights
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    # large parts of the kernel
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "personality": (135, 92),
    "modify_ldt": (154, None),
}
_MACHINES = {"x86_64": (0, 0xC000003E, 56, 41), "aarch64": (1, 0xC00000B7, 220, 198)}
"""Column of the table, number of the architecture, numbers of ``clone`` and ``socket``."""
_FAMILIES = (1, 2, 10, 16)
"""Sockets that namespaces separate: Unix, IP, kernel messages.  Those to a virtual machine's host are not among them."""
_CLONE3 = 435
_X32 = 0x40000000
"""x86_64 has all calls once more from here on."""
_NAMESPACES = 0x7E020000
"""Flags of ``clone``; those of ``clone3`` are in memory where no filter can look, so C libraries are told it is not there."""

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_SET_SECCOMP, _FILTER = 22, 2


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def refuse_calls() -> None:
    """Install the filter in this process; needs ``no_new_privs``.  OSError where the kernel has none; no-op elsewhere."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        return
    instructions = _instructions(*_MACHINES[machine])
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    if _libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program), 0, 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"seccomp: {os.strerror(error)}")


def _instructions(column: int, machine: int, clone: int, socket: int) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, value); a jump counts the instructions that it skips."""
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    lines = [(_LOAD, 0, 0, _MACHINE_AT), (_JUMP_EQUAL, 1, 0, machine), refuse]
    lines += [(_LOAD, 0, 0, _NUMBER_AT), (_JUMP_AT_LEAST, 0, 1, _X32), refuse]
    for numbers in _REFUSED.values():
        number = numbers[column]
        if number is not None:
            lines += [(_JUMP_EQUAL, 0, 1, number), refuse]
    lines += [(_JUMP_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    lines += [(_JUMP_EQUAL, 0, 3, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    lines += [(_JUMP_SET, 0, 1, _NAMESPACES), refuse]
    lines += [(_LOAD, 0, 0, _NUMBER_AT), (_JUMP_EQUAL, 1, 0, socket), (_RETURN, 0, 0, _ALLOW)]
    lines += [(_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    for i, family in enumerate(_FAMILIES):
        lines += [(_JUMP_EQUAL, len(_FAMILIES) - i, 0, family)]
    return [*lines, refuse, (_RETURN, 0, 0, _ALLOW)]
