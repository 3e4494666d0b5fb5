"""Fixtures for the allocators. A pool that a test leaves in use fails that test."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glake_infer.allocators import Pool, _native
from glake_infer.allocators import pool as pool_module

# pytest's importlib mode puts no test folder on the path; the suites share conformance.py and models.py.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def pool() -> Iterator[Pool]:
    """The pool of the device "cpu", with a limit of 1 GiB."""
    with pool_module._lock:
        pool_module._handles.clear()
    pool = Pool(limit="1GiB")
    yield pool
    gc.collect()  # sessions sit in cycles
    _native.host_pool().check_invariants()
    try:
        pool.close()
    finally:
        pool_module._handles.clear()
