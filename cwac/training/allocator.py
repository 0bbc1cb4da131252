"""Freed memory stays with the process on a CPU, so that a step takes up again what the step before it freed (ours).

glibc hands a large block back to the operating system when it is freed, and a new one comes page by page as it is
written. A step of full fine-tuning frees and takes up its gradients, as much as the weights: at SmolLM2's shape the
page faults cost a sixth of its CPU time. Adapters, whose gradients are small, gain nothing
(`benchmarks/allocator.py`). No digit of a run changes.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The numbers of mallopt's parameters, from glibc's malloc.h (`man 3 mallopt`)."""

MOST = 2**31 - 1
"""The largest value that mallopt takes, in bytes."""

OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Variables by which a user sets the same thresholds; `GLIBC_TUNABLES` is the third."""


def keep_freed_memory() -> bool:
    """Let glibc give nothing back below 2 GiB a block from here on; whether that was done.

    Not done under another C library than glibc, where the environment sets these thresholds itself, and where glibc
    refuses so large a value, as earlier ones do.
    """
    if platform.libc_ver()[0] != "glibc" or is_set_by_user():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, MOST) == 1 for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def is_set_by_user() -> bool:
    """Whether the environment holds one of glibc's own settings of its allocator's thresholds."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    named = any(f"glibc.malloc.{name}_threshold" in tunables for name in ("mmap", "trim"))
    return named or any(name in os.environ for name in OWN)
