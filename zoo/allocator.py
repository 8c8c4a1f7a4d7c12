"""How the C library that holds tensors on a CPU deals with memory that is freed."""

import ctypes
import sys

# malloc.h's numbers for what mallopt sets
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

_kept = False  # whether this process keeps what is freed, or that of which it is a fork


def keep_freed_memory() -> bool:
    """Let what is freed serve the next tensor; whether that was granted.

    By default glibc asks the system for each tensor of more than 32 MiB and gives it back at once: its pages are zeroed
    and mapped anew each time, which takes longer than most operators on it. From now on the process keeps what it has
    used, up to tensors of 1 GiB; at its peak it holds little more than before. Other C libraries stay as they are.
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

    What decodes images peaks at the largest of them and needs little in between; of many such processes each would
    hold the largest that it ever met. The thresholds are those that glibc itself goes up to.
    """
    global _kept
    if _kept:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 2**25)
        libc.mallopt(TRIM_THRESHOLD, 2**26)
        _kept = False
