"""Fixtures for the tests that need an NVIDIA GPU. $GLAKE_TEST_DEVICE names it; "cuda:0" otherwise."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from pathlib import Path

import pytest

# pytest's importlib mode puts no test folder on the path; these tests share kernels.py and the CPU tests' helpers.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "allocators"))


@pytest.fixture(scope="session")
def device():
    """The name of the device under test; CuPy's kernels and streams of this thread are on it."""
    from kernels import DEVICE, INDEX, cupy

    if INDEX:
        cupy().cuda.Device(INDEX).use()
    return DEVICE


@pytest.fixture
def pool(device):
    """The pool of the device, with a limit of 4 GiB. A test that leaves memory in use fails."""
    from kernels import synchronize

    from glake_infer import Pool
    from glake_infer.allocators import InvalidPointerError, PoolInUseError
    from glake_infer.allocators.pool import _handles

    pool = Pool(device, limit="4GiB")
    yield pool
    gc.collect()  # sessions sit in cycles
    synchronize()
    pool.check_invariants()
    try:
        pool.close()
    except PoolInUseError:  # a failure of this test alone, and not of all that follow
        if threading.active_count() > 1:
            pytest.exit("threads of a test that failed still run; nothing after it could be believed")
        for segment in pool.snapshot().segments:
            for used in segment.ranges:
                if used.state == "active":
                    with contextlib.suppress(InvalidPointerError):  # a session went meanwhile
                        pool.deallocate(used.address)
        with contextlib.suppress(PoolInUseError):
            pool.close()
        _handles.pop(device, None)  # weights of its sessions: the next handle takes the pool over
        raise
