"""What the C library does with the freed memory of tensors on a CPU."""

import ctypes
import sys

# malloc.h's numbers for what mallopt sets
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

_kept = False  # whether this process, or the one that it was forked from, keeps freed memory


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensors; returns whether the C library accepted that.

    By default glibc requests each tensor of more than 32 MiB from the system and returns it at once: its pages are
    zeroed and mapped anew each time, which takes longer than most operators on it. After this call the process keeps
    what it has used, for tensors of up to 1 GiB; its peak hardly grows. Other C libraries stay as they are.
    """
    global _kept
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # before 2.35 glibc refuses a threshold of more than 32 MiB
    _kept = bool(libc.mallopt(MMAP_THRESHOLD, 2**30)) and bool(libc.mallopt(TRIM_THRESHOLD, 2**31 - 1))
    return _kept


def give_freed_memory_back() -> None:
    """Undo `keep_freed_memory` in a fork of a process that called it, such as a data worker; else do nothing.

    A process that decodes images needs most memory for the largest of them and little in between; each of many such
    processes would hold on to that. The thresholds are the highest that glibc sets by itself.
    """
    global _kept
    if _kept:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**26)
        _kept = False
