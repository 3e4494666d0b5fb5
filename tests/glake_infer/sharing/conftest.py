"""A broker in a thread, and scripted clients (scripted.py)."""

import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import scripted

from glake_infer.sharing.broker import Broker


@pytest.fixture
def start(place):
    """Start a broker in a thread; it ends with the test. Its events are in `.events`."""
    with ExitStack() as stack:

        def started(name="b.sock", **options):
            events = []
            broker = Broker(place / name, log=events.append, **options)
            broker.events = events
            stack.enter_context(broker.running())
            return broker

        yield started


@pytest.fixture
def broker(start):
    """One with room for everything."""
    return start()


@pytest.fixture
def join(request):
    """Connect a scripted client to a broker; it ends with the test."""
    with ExitStack() as stack:

        def joined(broker, name="client", hello=True, **options):
            client = scripted.Peer(broker.path, name, **options)
            stack.callback(client.close)
            if hello:
                client.hello()
            return client

        yield joined


@pytest.fixture
def files(tmp_path):
    """Makes weights: files named by their digests."""
    return scripted.Files(tmp_path / "objects")


@contextmanager
def unchanged(settle=5.0):
    """Afterwards this process has no more descriptors and threads than before."""
    before = count()
    yield
    until = time.monotonic() + settle
    while (now := count()) > before and time.monotonic() < until:
        time.sleep(0.02)
    assert now <= before, (now, before)


class Count(tuple):
    """Descriptors and threads."""

    def __gt__(self, other):
        return any(a > b for a, b in zip(self, other, strict=True))

    def __le__(self, other):
        return not self > other


def count():
    # A broker's checks have a few threads of their own, each of which comes with the first work that it is needed for.
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("glake-infer check")]
    return Count([len(list(Path("/proc/self/fd").iterdir())), len(threads)])


@pytest.fixture
def nothing_leaks():
    return unchanged
