"""How many CPU threads a run computes with: torch's, and those of the BLAS and LAPACK that NumPy and SciPy bring."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy
import scipy
import torch

log = logging.getLogger(__name__)

NAMES = tuple(f"{before}openblas_{{}}_num_threads{after}" for before in ("scipy_", "") for after in ("", "64_"))
"""What OpenBLAS's functions are called in the wheels of NumPy and SciPy, and in builds of one's own."""


def use_threads(count: int | None) -> None:
    """Compute with so many threads from here on; None leaves torch's own number, and the libraries'.

    Where NumPy or SciPy brings another library than the OpenBLAS of its wheels (MKL and Accelerate read their
    environment, such as MKL_NUM_THREADS, at the start), a line in the log says so.
    """
    torch.set_num_threads(count or torch.get_num_threads())
    if count is None:
        return
    for package in (numpy, scipy):
        found = openblas(package.__name__, package.__file__)
        for library in found:
            function(library, "set")(count)
        if not found:
            log.info("threads=%d does not bound %s, which brings no OpenBLAS", count, package.__name__)


@functools.cache
def openblas(name: str, init: str) -> tuple[ctypes.CDLL, ...]:
    """The OpenBLAS libraries that a package's wheel brings; name, init: the package's, and where its first file is."""
    home = Path(init).parent
    folders = (home.with_name(f"{name}.libs"), home / ".dylibs")
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*openblas*"))]
    libraries = (ctypes.CDLL(str(path)) for path in paths)
    return tuple(library for library in libraries if function(library, "set") is not None)


def function(library: ctypes.CDLL, verb: str) -> Callable | None:
    """`set` or `get` of its number of threads; None where a library has none of the `NAMES`."""
    return next((getattr(library, name.format(verb)) for name in NAMES if hasattr(library, name.format(verb))), None)
