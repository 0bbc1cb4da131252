"""The setting `threads` bounds torch and the linear algebra of NumPy and SciPy."""

import logging

import numpy
import pytest
import scipy
import torch

from cwac.training import threads


def counts() -> list[int]:
    found = [library for package in (numpy, scipy) for library in threads.openblas(package.__name__, package.__file__)]
    return [threads.function(library, "get")() for library in found]


@pytest.fixture
def before():
    torch_had, had = torch.get_num_threads(), counts()
    yield had
    torch.set_num_threads(torch_had)
    if had:
        threads.use_threads(max(had))
        torch.set_num_threads(torch_had)


def test_the_linear_algebra_has_as_many_threads_as_torch(before):
    if not before:
        pytest.skip("neither NumPy nor SciPy brings an OpenBLAS here")
    for count in (2, 1):
        threads.use_threads(count)
        assert torch.get_num_threads() == count
        # as a library was built for, at most; NumPy's and SciPy's are two
        assert all(found <= count for found in counts()) and len(counts()) == len(before)
    assert set(counts()) == {1}
    threads.use_threads(None)
    assert set(counts()) == {1} and torch.get_num_threads() == 1


def test_a_library_that_cannot_be_bound_is_named(before, monkeypatch, caplog):
    monkeypatch.setattr(threads, "openblas", lambda name, init: ())
    with caplog.at_level(logging.INFO):
        threads.use_threads(1)
    assert "threads=1 does not bound numpy" in caplog.text and "bound scipy" in caplog.text
