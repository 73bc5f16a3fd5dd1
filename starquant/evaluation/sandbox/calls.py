"""System calls that no program needs, refused by the kernel: they reach past walls. Standard library only.

Namespaces do not hold sockets to the host of a virtual machine (AF_VSOCK) and keys of the session; limits do not count
shared memory, nor files in a file system that a program mounts in a user namespace of its own.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
CLONE_NEWUSER = 0x1000_0000
#: Machine: what `seccomp_data.arch` says on it, then the calls' numbers (asm/unistd.h).
_MACHINES = {
    "x86_64": (0xC000_003E, {
        "clone": 56, "clone3": 435, "socket": 41, "unshare": 272, "setns": 308, "shmget": 29, "semget": 64,
        "msgget": 68, "add_key": 248, "request_key": 249, "keyctl": 250, "io_uring_setup": 425,
    }),
    "aarch64": (0xC000_00B7, {
        "clone": 220, "clone3": 435, "socket": 198, "unshare": 97, "setns": 268, "shmget": 194, "semget": 190,
        "msgget": 186, "add_key": 217, "request_key": 218, "keyctl": 219, "io_uring_setup": 425,
    }),
}  # fmt: skip
_OTHER_ABI = 0x4000_0000  # x32 numbers its calls from here; other machines have none so high
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF_0000, 0x0005_0000


def refuse_calls() -> bool:
    """Have the kernel refuse them to this process and all that it starts; return whether it does so.

    It does not on another system, on a machine that has no line in the table, or without CONFIG_SECCOMP_FILTER.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES or sys.maxsize < 1 << 32:
        return False
    import ctypes

    code = _filter(*_MACHINES[platform.machine()])
    text = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(text)))
    prctl, zero = ctypes.CDLL(None).prctl, ctypes.c_ulong(0)
    prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    return bool(prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program, zero, zero) == 0)


def _filter(machine: int, numbers: dict[str, int]) -> bytes:
    """Return the filter: 8 bytes an instruction (code, steps to skip if true, if false, constant)."""
    refused = [name for name in numbers if name not in ("clone", "clone3", "socket")]
    steps = [
        (_LOAD, 0, 0, _ARCH),
        *_unless(_EQUAL, machine, [_error(errno.ENOSYS)]),
        (_LOAD, 0, 0, _NUMBER),
        *_where(_AT_LEAST, _OTHER_ABI, [_error(errno.ENOSYS)]),
        *_where(_EQUAL, numbers["clone3"], [_error(errno.ENOSYS)]),  # its flags lie in memory; libraries then use clone
    ]
    for name in refused:
        steps += _where(_EQUAL, numbers[name], [_error(errno.EPERM)])
    clone = [(_LOAD, 0, 0, _FIRST_ARGUMENT), *_where(_BITS, CLONE_NEWUSER, [_error(errno.EPERM)]), _allow()]
    families = [step for family in FAMILIES for step in _where(_EQUAL, family, [_allow()])]
    opened = [(_LOAD, 0, 0, _FIRST_ARGUMENT), *families, _error(errno.EAFNOSUPPORT)]
    steps += [*_where(_EQUAL, numbers["clone"], clone), *_where(_EQUAL, numbers["socket"], opened), _allow()]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


_Step = tuple[int, int, int, int]


def _where(test: int, constant: int, then: list[_Step]) -> list[_Step]:
    return [(test, 0, len(then), constant), *then]


def _unless(test: int, constant: int, then: list[_Step]) -> list[_Step]:
    return [(test, len(then), 0, constant), *then]


def _error(number: int) -> _Step:
    return (_RETURN, 0, 0, _ERROR | number)


def _allow() -> _Step:
    return (_RETURN, 0, 0, _ALLOW)
