"""On a CPU the memory that a step frees stays with the process, so that the next step takes it up again."""

import os
import platform
import subprocess
import sys

import pytest

from cwac.core import config
from cwac.core.run_dir import Run
from cwac.training import allocator
from cwac.training import run as steps

GIVEN_BACK = """
import resource, sys, torch
from pathlib import Path
from cwac.training.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

if sys.argv[1] == "kept":
    assert keep_freed_memory()
gradients = [torch.ones(16, 2**20) for _ in range(4)]  # 64 MiB each, more than glibc keeps by itself
before = resident()
del gradients
print(before - resident())
"""


def given_back(kind: str) -> float:
    """MiB of 256 that a process gives back when it frees them."""
    environment = {k: v for k, v in os.environ.items() if k not in (*allocator.OWN, "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK, kind], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_stays_with_the_process():
    assert given_back("kept") < 64 < 192 < given_back("as glibc comes")


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536", True),
        ("MALLOC_TRIM_THRESHOLD_", "65536", True),
        ("GLIBC_TUNABLES", "glibc.malloc.check=1:glibc.malloc.trim_threshold=65536", True),
        ("GLIBC_TUNABLES", "glibc.malloc.check=1", False),
    ],
)
def test_a_threshold_of_the_users_own_stands(name, value, own, monkeypatch):
    for other in (*allocator.OWN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
    called = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library(called))
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() is not own
    assert called == ([] if own else [(-3, 2**31 - 1), (-1, 2**31 - 1)])


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("was loaded"))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_a_run_keeps_memory_on_a_cpu_alone(device, kept, tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def arguments(cfg, run):
        found = config_arguments(cfg, run)
        monkeypatch.setattr(type(found), "device", Device(device))
        return found

    def stop(*given):
        raise Asked

    config_arguments = steps.training_arguments
    called = []
    monkeypatch.setattr(steps, "training_arguments", arguments)
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(steps, "check_precision", stop)
    cfg = config.compose(["model=tiny", "task=toy_sentiment", f"paths.runs={tmp_path}"])
    with pytest.raises(Asked):
        steps.prepare(cfg, Run(cfg))
    assert called == [True] * kept


class Library:
    """Stands for the C library; `called` gets what mallopt is called with."""

    def __init__(self, called: list):
        self._called = called

    def mallopt(self, parameter: int, value: int) -> int:
        self._called.append((parameter, value))
        return 1


class Device:
    """Stands for `torch.device`."""

    def __init__(self, kind: str):
        self.type = kind
