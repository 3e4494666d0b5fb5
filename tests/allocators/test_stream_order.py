"""The pool's stream order on the simulated device: nobody's memory is touched by work that was queued before.

Every stream of the device is a thread that works late, so memory that is used again too early shows wrong bytes
(`mismatches`); a call that would crash CUDA or break a capture is counted (`misuses`); memory that is unmapped under
queued work ends the process.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import processes
import pytest

from glake_infer.allocators import OutOfMemoryError, _native
from glake_infer.allocators.errors import InvalidPointerError

KiB = 2**10
MiB = 2**20
LATE = 100_000  # microseconds by which work lags behind
LATER = 2 * LATE


class Machine:
    """A simulated device with a pool on it."""

    def __init__(self, limit, **options):
        self.device = _native.SimulatedDevice()
        self.pool = _native.Pool.simulated(self.device, limit)
        self.pool.configure(**options)

    def streams(self, count):
        return [self.device.new_stream() for _ in range(count)]

    def take(self, size, stream=-1, tag="activations"):
        return self.pool.allocate(size, tag, stream)

    def use_late(self, stream, address, size, value):
        """Work that is not done for a while; gives an event that stands for it."""
        self.device.enqueue_delay(stream, LATE)
        self.device.enqueue_fill(stream, address, size, value)
        self.device.enqueue_check(stream, address, size, value)
        event = self.device.create_event()
        self.device.record(event, stream)
        return event

    def use(self, stream, address, size, value):
        """Work at once, whose result is looked at when all earlier late work has been done."""
        self.device.enqueue_fill(stream, address, size, value)
        self.device.enqueue_delay(stream, LATER)
        self.device.enqueue_check(stream, address, size, value)

    def capture(self, stream, size, value):
        """A graph that fills memory which it allocates and frees; gives it and the address."""
        self.device.begin_capture(stream)
        address = self.take(size, stream)
        self.device.enqueue_fill(stream, address, size, value)
        self.device.enqueue_check(stream, address, size, value)
        self.pool.deallocate(address)
        return self.device.end_capture(stream), address

    def take_all(self, stream, size):
        blocks = []
        with contextlib.suppress(OutOfMemoryError):
            while True:
                blocks.append(self.take(size, stream))
        return blocks

    def replay_hits_nobody(self, graph, stream, other, size=MiB):
        """Takes all that the pool gives on `other`, and launches the graph meanwhile."""
        blocks = self.take_all(other, size)
        for block in blocks:
            self.device.enqueue_fill(other, block, size, 200)
        self.device.synchronize_stream(other)
        self.device.launch_graph(graph, stream)
        self.device.synchronize_stream(stream)
        for block in blocks:
            self.device.enqueue_check(other, block, size, 200)
            self.pool.deallocate(block)
        self.device.synchronize_stream(other)
        return len(blocks) * size

    def finish(self):
        assert self.device.synchronize_all()
        self.pool.check_invariants()
        assert self.device.misuses == 0
        return self.device.mismatches

    def empty(self):
        """Nothing is left once all is done."""
        assert self.device.synchronize_all()
        assert self.device.synchronize_all()  # the launches have let go of their graphs
        self.pool.trim()
        stats = self.pool.stats()
        assert (stats["active"], stats["reserved"], stats["mappings"]) == (0, 0, 0)


@pytest.fixture
def machine(monkeypatch):
    """`machine(limit, **options)`; at the end nothing was wrong. Invariants are checked after every operation."""
    monkeypatch.setenv("GLAKE_CHECK_INVARIANTS", "1")
    made = []

    def make(limit, **options):
        made.append(Machine(limit, **options))
        return made[-1]

    yield make
    for each in made:
        assert each.finish() == 0


# Each of these would see wrong bytes if the pool did not wait (test_without_waiting_...).


def from_stream_to_stream(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, one)
    event = m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    address = m.take(4 * MiB, two)
    assert not m.device.finished(event), "the host waited"
    m.use(two, address, 4 * MiB, 2)


def from_no_stream_to_stream(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB)
    event = m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    address = m.take(4 * MiB, two)
    assert not m.device.finished(event), "the host waited"
    m.use(two, address, 4 * MiB, 2)


def from_stream_to_no_stream(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, one)
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.use(two, m.take(4 * MiB), 4 * MiB, 2)


def from_no_stream_to_no_stream(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB)
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.use(two, m.take(4 * MiB), 4 * MiB, 2)


def from_no_stream_to_no_stream_of_another_size(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB)
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.use(two, m.take(3 * MiB), 3 * MiB, 2)


def weights_to_activations(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, tag="weights")
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.use(two, m.take(4 * MiB, two), 4 * MiB, 2)


def objects_without_a_stream(m):
    one, two = m.streams(2)
    keep = m.take(1000)  # the slab stays
    address = m.take(1000)
    m.use_late(one, address, 1000, 1)
    m.pool.deallocate(address)
    again = [m.take(1000) for _ in range(70)]
    assert address in again
    m.use(two, address, 1000, 2)
    m.pool.deallocate(keep)


def objects_from_stream_to_stream(m):
    one, two = m.streams(2)
    m.pool.set_limit(64 * KiB)
    objects = [m.take(2000, one) for _ in range(20)]
    for address in objects:
        m.device.enqueue_delay(one, LATE // 20)
        m.device.enqueue_fill(one, address, 2000, 1)
    for address in objects:
        m.pool.deallocate(address)
    for address in [m.take(3000, two) for _ in range(15)]:
        m.device.enqueue_fill(two, address, 3000, 2)
        objects.append(address)
    m.device.enqueue_delay(two, 2 * LATER)
    for address in objects[20:]:
        m.device.enqueue_check(two, address, 3000, 2)


def partly_used_chunk(m):
    one, two = m.streams(2)
    m.pool.set_limit(2 * MiB)
    m.pool.deallocate(m.take(2 * MiB, one))  # one chunk
    parts = [m.take(MiB, one) for _ in range(2)]
    assert m.pool.stats()["chunks"] == 1
    for part in parts:
        m.device.enqueue_delay(one, LATE // 2)
        m.device.enqueue_fill(one, part, MiB, 1)
    m.pool.deallocate(parts[0])
    with pytest.raises(OutOfMemoryError):
        m.take(MiB, two)  # the rest of the chunk is the other stream's
    m.pool.deallocate(parts[1])
    m.use(two, m.take(2 * MiB, two), 2 * MiB, 2)


def stitched_chunks_of_several_streams(m):
    *writers, reader = m.streams(5)
    m.pool.set_limit(4 * MiB)
    blocks = [m.take(MiB, stream) for stream in writers]
    for stream, block in zip(writers, blocks, strict=True):
        m.use_late(stream, block, MiB, 1)
        m.pool.deallocate(block)
    stitches = m.pool.stats()["stitches"]
    address = m.take(4 * MiB, reader)
    assert m.pool.stats()["stitches"] == stitches + 4
    m.use(reader, address, 4 * MiB, 2)


def one_chunk_of_many_streams(m):
    streams = m.streams(8)
    m.pool.set_limit(2 * MiB)
    m.device.enqueue_delay(streams[0], LATE)
    for number, stream in enumerate(streams * 2):
        address = m.take(2 * MiB, stream)
        m.device.enqueue_fill(stream, address, 2 * MiB, number)
        m.device.enqueue_delay(stream, 2000)
        m.device.enqueue_check(stream, address, 2 * MiB, number)
        m.pool.deallocate(address)


def stream_that_is_gone(m):
    one, two = m.streams(2)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, one)
    m.use_late(one, address, 4 * MiB, 1)
    m.device.destroy_stream(one)
    m.pool.deallocate(address)
    m.use(two, m.take(4 * MiB, two), 4 * MiB, 2)


def handle_that_is_used_again(m):
    (one,) = m.streams(1)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, one)
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.device.destroy_stream(one)
    assert m.streams(1) == [one]
    m.use(one, m.take(4 * MiB, one), 4 * MiB, 2)


def wipe_before_another_stream(m):
    one, two = m.streams(2)
    m.pool.configure(wipe=True, **m.ignoring)
    m.pool.set_limit(4 * MiB)
    address = m.take(4 * MiB, one)
    m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    address = m.take(4 * MiB, two)
    m.device.enqueue_check(two, address, 4 * MiB, 0)
    m.use(two, address, 4 * MiB, 2)


def wipe_before_the_same_stream(m):
    one, two = m.streams(2)
    m.pool.configure(wipe=True, **m.ignoring)
    m.pool.set_limit(1536 * KiB)
    address = m.take(1536 * KiB, one)
    m.device.enqueue_fill(one, address, 1536 * KiB, 1)
    m.device.enqueue_delay(two, LATE)  # the wipe waits for all streams
    m.pool.deallocate(address)
    address = m.take(512 * KiB, one)  # of another kind: one of the chunks, at another address
    m.device.enqueue_check(one, address, 512 * KiB, 0)
    m.use(one, address, 512 * KiB, 2)


def wipe_of_objects(m):
    one, two = m.streams(2)
    m.pool.configure(wipe=True, **m.ignoring)
    for stream in (one, -1):
        keep = m.take(1000, stream)
        address = m.take(1000, stream)
        m.use_late(one, address, 1000, 1)
        m.pool.deallocate(address)
        for again in [m.take(1000, stream) for _ in range(70)]:
            if again == address:
                m.device.enqueue_check(one if stream == one else two, again, 1000, 0)
                m.use(one if stream == one else two, again, 1000, 2)
        m.pool.deallocate(keep)


SCENARIOS = [
    from_stream_to_stream,
    from_no_stream_to_stream,
    from_stream_to_no_stream,
    from_no_stream_to_no_stream,
    from_no_stream_to_no_stream_of_another_size,
    weights_to_activations,
    objects_without_a_stream,
    objects_from_stream_to_stream,
    partly_used_chunk,
    stitched_chunks_of_several_streams,
    one_chunk_of_many_streams,
    stream_that_is_gone,
    handle_that_is_used_again,
    wipe_before_another_stream,
    wipe_before_the_same_stream,
    wipe_of_objects,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_memory_that_moves_waits_for_the_work_on_it(machine, scenario):
    m = machine(64 * MiB)
    m.ignoring = {}
    scenario(m)


# (one_chunk_of_many_streams would crash: it unmaps what is still used. A wipe that nothing holds back is often in time
# by chance.)
@pytest.mark.parametrize(
    "scenario",
    [each for each in SCENARIOS if each not in (one_chunk_of_many_streams, wipe_before_the_same_stream)],
)
def test_without_waiting_the_same_shows_wrong_bytes(scenario):
    m = Machine(64 * MiB, ignore_streams=True)
    m.ignoring = {"ignore_streams": True}
    scenario(m)
    assert m.finish() > 0


def test_a_stream_reuses_its_own_memory_at_once(machine):
    m = machine(4 * MiB)
    (one,) = m.streams(1)
    address = m.take(4 * MiB, one)
    event = m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    calls = m.pool.stats()["driver_calls"]
    assert m.take(4 * MiB, one) == address
    assert m.pool.stats()["driver_calls"] == calls
    assert not m.device.finished(event)
    m.use(one, address, 4 * MiB, 2)
    small = m.take(100, one) if m.pool.set_limit(5 * MiB) is None else 0
    m.pool.deallocate(small)
    assert m.take(100, one) == small
    assert not m.device.finished(event)


@pytest.mark.parametrize("way", ["trim", "set_limit", "larger_request", "debug", "prune"])
def test_nothing_is_unmapped_under_queued_work(machine, way):
    m = machine(8 * MiB)
    streams = m.streams(4)
    events = []
    for number, stream in enumerate(streams):
        address = m.take(2 * MiB, stream)
        events.append(m.use_late(stream, address, 2 * MiB, number))
        m.pool.deallocate(address)
        small = m.take(5000, -1) if number == 3 else m.take(5000, stream)
        m.device.enqueue_fill(stream, small, 5000, number)
        m.pool.deallocate(small)
    if way == "trim":
        assert m.pool.trim() > 0
    elif way == "set_limit":
        m.pool.set_limit(1 * MiB)
    elif way == "larger_request":
        for stream in m.streams(3):  # of other streams, which wait on the device
            address = m.take(8 * MiB, stream)
            m.device.enqueue_fill(stream, address, 8 * MiB, 9)
            m.device.enqueue_check(stream, address, 8 * MiB, 9)
            m.pool.deallocate(address)
    elif way == "debug":
        m.pool.configure(debug="on")
        m.pool.configure(debug="off")
    else:
        for stream in m.streams(100):
            m.pool.deallocate(m.take(64 * KiB, stream))
    if way in ("trim", "set_limit", "debug"):
        assert all(m.device.finished(event) for event in events)
    m.empty()


def test_streams_that_nothing_lives_in_are_forgotten(machine):
    m = machine(32 * MiB)
    keep = m.take(MiB, m.streams(1)[0])
    for round_ in range(2):
        for stream in m.streams(100):
            address, small = m.take(128 * KiB, stream), m.take(300, stream)
            m.use_late(stream, address, 128 * KiB, round_) if stream % 64 == 0 else None
            m.device.enqueue_fill(stream, small, 300, round_)
            m.pool.deallocate(address)
            m.pool.deallocate(small)
            m.device.destroy_stream(stream)
        assert m.device.synchronize_all()
        m.pool.deallocate(m.take(128 * KiB, m.streams(1)[0]))
        assert m.pool.stats()["arenas"] <= 66
    m.pool.deallocate(keep)
    m.empty()


# CUDA graphs.


@pytest.mark.parametrize("size", [1000, 40 * KiB, 3 * MiB])
def test_a_graph_keeps_what_it_freed(machine, size):
    m = machine(16 * MiB)
    one, two = m.streams(2)
    graph, _ = m.capture(one, size, 7)
    kept = m.pool.stats()["reserved"]
    assert m.replay_hits_nobody(graph, one, two) > 8 * MiB
    assert m.replay_hits_nobody(graph, one, one) > 8 * MiB
    m.pool.trim()
    assert 0 < m.pool.stats()["reserved"] <= kept
    m.device.destroy_graph(graph)
    m.empty()


def test_requests_of_a_capture_grow_shrink_and_reuse(machine):
    m = machine(64 * MiB)
    one, two = m.streams(2)
    m.device.begin_capture(one)
    random_ = random.Random(1)
    live = []
    for number in range(120):
        size = int(2 ** random_.uniform(6, 22))
        address = m.take(size, one)
        live.append((address, size, number))
        m.device.enqueue_fill(one, address, size, number)
        if len(live) > 4:
            address, size, value = live.pop(random_.randrange(len(live)))
            m.device.enqueue_check(one, address, size, value)
            m.pool.deallocate(address)
    for address, size, value in live:
        m.device.enqueue_check(one, address, size, value)
        m.pool.deallocate(address)
    graph = m.device.end_capture(one)
    assert m.pool.stats()["reserved"] < 40 * MiB
    m.replay_hits_nobody(graph, one, two)
    m.device.destroy_graph(graph)
    m.empty()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("size", [1000, 2 * MiB])
def test_a_graph_keeps_what_was_there_before_and_freed_meanwhile(machine, size, named):
    m = machine(8 * MiB)
    one, two = m.streams(2)
    address = m.take(size, one)
    m.device.begin_capture(one)
    if not named:  # the pool knows of the capture from a request
        m.pool.deallocate(m.take(100, one))
    m.device.enqueue_fill(one, address, size, 7)
    m.pool.deallocate(address, one if named else -1)
    with pytest.raises(InvalidPointerError, match="freed already"):
        m.pool.deallocate(address)
    graph = m.device.end_capture(one)
    m.replay_hits_nobody(graph, one, two, 64 * KiB)
    m.replay_hits_nobody(graph, one, one, 64 * KiB)
    m.device.destroy_graph(graph)
    m.empty()


@pytest.mark.parametrize("tag", ["activations", "weights"])
@pytest.mark.parametrize("owner", ["nobody", "other"])
@pytest.mark.parametrize("size", [1000, 2 * MiB])
def test_a_graph_keeps_what_others_had_if_it_is_freed_on_its_stream(machine, owner, size, tag):
    m = machine(8 * MiB)
    one, two = m.streams(2)
    address = m.take(size, -1 if owner == "nobody" else two, tag)
    m.device.begin_capture(one)
    m.device.enqueue_fill(one, address, size, 7)
    m.pool.deallocate(address, one)
    graph = m.device.end_capture(one)
    m.replay_hits_nobody(graph, one, two, 64 * KiB)
    m.device.destroy_graph(graph)
    m.empty()


def test_a_live_block_of_a_capture_outlives_its_graph(machine):
    m = machine(4 * MiB)
    one, two = m.streams(2)
    m.device.begin_capture(one)
    address, small = m.take(MiB, one), m.take(1000, one)
    m.device.enqueue_fill(one, address, MiB, 7)
    graph = m.device.end_capture(one)
    m.device.launch_graph(graph, one)
    m.device.destroy_graph(graph)
    m.device.synchronize_stream(one)
    m.device.synchronize_stream(one)
    m.pool.trim()  # the graph is gone
    m.device.enqueue_check(one, address, MiB, 7)
    m.use_late(one, address, MiB, 8)
    m.device.enqueue_fill(one, small, 1000, 8)
    m.pool.deallocate(address)
    m.pool.deallocate(small)
    for block in m.take_all(two, MiB):
        m.use(two, block, MiB, 9)
        m.pool.deallocate(block)
    m.empty()


def test_captures_on_several_streams_have_memory_of_their_own(machine):
    m = machine(16 * MiB)
    streams = m.streams(3)
    for stream in streams:
        m.device.begin_capture(stream)
    for number in range(4):
        for value, stream in enumerate(streams):
            address = m.take(MiB, stream)
            m.device.enqueue_fill(stream, address, MiB, 16 * number + value)
            m.device.enqueue_delay(stream, 5000)
            m.device.enqueue_check(stream, address, MiB, 16 * number + value)
            m.pool.deallocate(address)
    graphs = [m.device.end_capture(stream) for stream in streams]
    assert m.pool.stats()["reserved"] == 3 * MiB
    for _ in range(2):  # all at once
        for graph, stream in zip(graphs, streams, strict=True):
            m.device.launch_graph(graph, stream)
    for graph in graphs:
        m.device.destroy_graph(graph)
    m.empty()


def test_a_capture_after_another_on_one_stream_does_not_share(machine):
    m = machine(16 * MiB)
    one, two = m.streams(2)
    graphs = [m.capture(one, MiB, value) for value in range(3)]
    assert len({address for _, address in graphs}) == 3
    for graph, _ in graphs:
        m.device.launch_graph(graph, one)
        m.device.launch_graph(graph, two)
        m.device.destroy_graph(graph)
        assert m.device.synchronize_all()
    m.empty()


def test_arenas_of_graphs_that_are_gone_are_forgotten(machine):
    m = machine(16 * MiB)
    m.device.wait_in_captures(True)
    (one,) = m.streams(1)
    for value in range(150):
        graph, _ = m.capture(one, MiB, value)
        m.device.destroy_graph(graph)
    assert m.pool.stats()["reserved"] <= 16 * MiB
    m.empty()
    assert m.pool.stats()["arenas"] <= 66


def test_a_capture_that_ended_lets_its_stream_free_again(machine):
    m = machine(4 * MiB)
    one, two = m.streams(2)
    address = m.take(2 * MiB, one)
    graph, _ = m.capture(one, MiB, 1)
    m.pool.deallocate(m.take(256, one))  # shows that the capture is over
    m.pool.deallocate(address)
    m.use(two, m.take(2 * MiB, two), 2 * MiB, 2)
    m.device.launch_graph(graph, one)
    m.device.destroy_graph(graph)


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "announced"])
def test_others_go_on_during_a_capture_and_do_not_break_it(machine, seen):
    m = machine(8 * MiB)
    m.device.wait_in_captures(True)
    one, two, three = m.streams(3)
    foreign = m.take(MiB, one)
    address = m.take(4 * MiB, two)
    event = m.use_late(two, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.device.begin_capture(one)
    if seen:
        m.pool.deallocate(m.take(100, one))
    else:
        m.pool.expect_captures(True)
    m.device.enqueue_fill(one, foreign, MiB, 5)
    address = m.take(6 * MiB, three)  # has to move from the other stream
    assert m.device.finished(event), "the host waits: no event can be recorded"
    m.use(three, address, 6 * MiB, 2)
    m.pool.deallocate(address)

    def others():
        for size in (1000, 100 * KiB, 5 * MiB):
            for stream in (two, three, -1, two):
                address = m.take(size, stream)
                m.use_late(stream if stream != -1 else two, address, size, 3)
                m.pool.deallocate(address)
        m.pool.trim()
        m.pool.set_limit(7 * MiB)

    # On a thread of its own: what the capturing thread takes without a stream and gives back stays with the graph.
    with ThreadPoolExecutor(1) as executor:
        executor.submit(others).result()
    graph = m.device.end_capture(one)
    assert graph != 0
    if not seen:
        m.pool.expect_captures(False)
    m.device.launch_graph(graph, one)
    m.device.enqueue_check(one, foreign, MiB, 5)
    m.device.destroy_graph(graph)
    m.pool.deallocate(foreign)
    m.empty()


def test_announced_captures_nest_and_end(machine):
    m = machine(4 * MiB)
    one, two = m.streams(2)
    m.pool.expect_captures(True)
    m.pool.expect_captures(True)
    m.pool.expect_captures(False)
    m.device.begin_capture(m.streams(1)[0])
    address = m.take(4 * MiB)
    m.pool.deallocate(address)  # without a stream: records an event where it may
    m.pool.expect_captures(False)
    m.device.end_capture(3 * one)
    address = m.take(4 * MiB, one)
    event = m.use_late(one, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.use(two, m.take(4 * MiB, two), 4 * MiB, 2)
    assert not m.device.finished(event)  # the device waits again, and not the host


def test_a_broken_capture_gives_everything_back(machine):
    m = machine(4 * MiB)
    one, two = m.streams(2)
    m.device.begin_capture(one)
    address, live = m.take(MiB, one), m.take(MiB, one)
    m.pool.deallocate(address)
    before = m.device.misuses
    with pytest.raises(Exception, match="break the capture"):
        m.device.synchronize_stream(one)
    m.pool.deallocate(m.take(MiB, one))  # still its own
    assert m.device.end_capture(one) == 0
    assert m.device.misuses == before + 1
    m.pool.deallocate(live)
    m.use(two, m.take(4 * MiB, two), 4 * MiB, 2)
    m.device.synchronize_all()
    assert (m.device.mismatches, m.device.misuses) == (0, 1)
    m.device = type(
        "Excused", (), {"synchronize_all": m.device.synchronize_all, "misuses": 0, "mismatches": 0}
    )


@pytest.mark.parametrize("size", [1000, MiB])
def test_a_graph_keeps_what_its_thread_took_and_freed_without_a_stream(machine, size):
    m = machine(16 * MiB)
    one, other = m.streams(2)
    m.device.wait_in_captures(True)
    m.device.begin_capture(one)
    address = m.take(size)  # as ONNX Runtime takes the block of a memory pattern
    m.pool.deallocate(m.take(100, one))  # by this the pool knows of the capture
    m.device.enqueue_fill(one, address, size, 9)
    m.device.enqueue_check(one, address, size, 9)
    m.pool.deallocate(address)
    graph = m.device.end_capture(one)
    m.replay_hits_nobody(graph, one, other, size)
    m.device.destroy_graph(graph)
    m.empty()


def test_a_thread_that_captured_once_keeps_nothing_more_for_the_graph(machine):
    """Its graph is only replayed from then on, and its stream never asks again."""
    m = machine(64 * MiB)
    one, other = m.streams(2)
    m.device.wait_in_captures(True)
    graph, _ = m.capture(one, MiB, 9)
    kept = m.pool.stats()["active"]
    for _ in range(20):
        address = m.take(2 * MiB)
        m.device.enqueue_fill(other, address, 2 * MiB, 1)
        m.pool.deallocate(address)
    assert m.pool.stats()["active"] == kept
    m.device.destroy_graph(graph)
    m.empty()


def test_after_a_capture_that_is_said_to_be_over_events_are_used_again(machine):
    m = machine(8 * MiB)
    one, two, three = m.streams(3)
    graph, _ = m.capture(one, MiB, 9)
    m.pool.captures_ended()
    address = m.take(4 * MiB, two)
    event = m.use_late(two, address, 4 * MiB, 1)
    m.pool.deallocate(address)
    m.pool.set_limit(m.pool.stats()["reserved"])
    address = m.take(4 * MiB, three)
    assert not m.device.finished(event), "the host waited"
    m.use(three, address, 4 * MiB, 2)
    m.pool.deallocate(address)
    m.replay_hits_nobody(graph, one, two)
    m.device.destroy_graph(graph)


def test_what_a_graph_leaves_is_wiped(machine):
    m = machine(4 * MiB, wipe=True)
    one, other = m.streams(2)
    graph, _ = m.capture(one, MiB, 9)
    m.device.launch_graph(graph, one)
    m.device.synchronize_stream(one)
    m.device.destroy_graph(graph)
    assert m.device.synchronize_all()
    blocks = m.take_all(other, MiB)
    assert len(blocks) == 4
    for block in blocks:
        m.device.enqueue_check(other, block, MiB, 0)
        m.pool.deallocate(block)


def test_a_graph_that_cannot_be_wiped_yet_is_not_forgotten(machine):
    """Its end comes while another stream is captured, when the device cannot be waited for."""
    m = machine(8 * MiB, wipe=True)
    one, two = m.streams(2)
    before = m.take(2 * MiB, one)
    m.device.begin_capture(one)
    own = m.take(64 * KiB, one)
    m.pool.deallocate(before, one)
    graph = m.device.end_capture(one)
    m.device.destroy_graph(graph)
    m.device.begin_capture(two)
    other = m.take(64 * KiB, two)
    graph = m.device.end_capture(two)
    m.device.destroy_graph(graph)
    assert m.device.synchronize_all()
    m.pool.captures_ended()
    m.pool.deallocate(own)
    m.pool.deallocate(other)
    m.empty()


def test_a_file_is_mapped_where_a_graph_that_is_gone_was(machine, tmp_path):
    m = machine(4 * MiB)
    (one,) = m.streams(1)
    graph, _ = m.capture(one, 4 * MiB, 9)
    m.device.destroy_graph(graph)
    assert m.device.synchronize_all()
    path = tmp_path / "weights"
    path.write_bytes(b"w" * MiB)
    with path.open("rb") as file:
        m.pool.unmap_file(m.pool.map_file(file.fileno(), MiB))
    m.empty()


def test_wiping_leaves_a_graphs_memory_alone(machine):
    m = machine(8 * MiB, wipe=True)
    m.device.wait_in_captures(True)
    one, two = m.streams(2)
    m.device.begin_capture(one)
    address = m.take(MiB, one)
    m.device.enqueue_fill(one, address, MiB, 7)
    graph = m.device.end_capture(one)
    m.device.launch_graph(graph, one)
    m.device.synchronize_stream(one)
    m.pool.deallocate(address)
    m.device.enqueue_delay(two, LATE)
    m.device.enqueue_check(two, address, MiB, 7)
    m.device.synchronize_stream(two)
    m.device.destroy_graph(graph)
    for block in m.take_all(two, MiB):
        m.device.enqueue_fill(two, block, MiB, 1)
        m.pool.deallocate(block)
    m.empty()


# Many threads.

THREADS = 4
OPERATIONS = int(os.environ.get("GLAKE_STRESS_OPERATIONS", "1000"))  # of each thread


def stress(operations, seed, captures=False, **options):
    """Threads with a stream each, one without, and one that trims; gives the device after the work, and the pool."""
    m = Machine(24 * MiB, **options)
    m.device.wait_in_captures(True)
    errors = []
    graphs = m.graphs = [0]

    def work(number):
        try:
            use_it(random.Random(seed * 100 + number), number)
        except BaseException as error:
            errors.append(error)

    def use_it(chance, number):
        device, pool = m.device, m.pool
        own = m.streams(2)
        named = number != 0  # the first one's requests name no stream
        live = []

        def drop():
            stream, address, size, value = live.pop(chance.randrange(len(live)))
            device.enqueue_check(stream, address, size, value)
            pool.deallocate(address)

        for step in range(operations):
            size = int(2 ** chance.uniform(6, 23))
            stream = own[0] if named else chance.choice(own)
            value = chance.randrange(1, 256)
            while True:
                try:
                    address = pool.allocate(size, "activations", stream if named else -1)
                    break
                except OutOfMemoryError:
                    if not live:
                        size = max(64, size // 4)
                    else:
                        drop()
            delay = chance.choice([0, 0, 0, 200, 1000])
            device.enqueue_fill(stream, address, size, value, delay)
            live.append((stream, address, size, value))
            while len(live) > 6 or (live and chance.random() < 0.4):
                drop()
            if named and step % 50 == 49:  # a new stream, perhaps with an old handle
                while live:
                    drop()
                device.destroy_stream(own[0])
                own[0] = device.new_stream()
            if step % 25 == 24:
                device.synchronize_stream(own[1])
                pool.check_invariants()
            if captures and number == 1 and step % 40 == 20:  # and a graph, launched while the others go on
                pool.expect_captures(True)  # the pool does not know of it before its first request
                try:
                    graph, _ = m.capture(own[1], 32 * KiB, value)
                except OutOfMemoryError:
                    graph = device.end_capture(own[1])
                pool.expect_captures(False)
                device.launch_graph(graph, own[1])
                device.destroy_graph(graph)
                graphs[0] += 1
        while live:
            drop()

    def disturb():
        chance = random.Random(seed)
        while not over.wait(0.02):
            m.pool.trim(chance.randrange(24 * MiB))

    over = threading.Event()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    disturber = threading.Thread(target=disturb)
    for thread in [*threads, disturber]:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    disturber.join()
    if errors:
        raise errors[0]
    return m


@pytest.mark.parametrize("captures", [False, True])
def test_threads_with_their_streams_never_see_each_others_data(captures):
    m = stress(OPERATIONS, seed=1, captures=captures)
    assert m.finish() == 0
    assert m.pool.stats()["stitches"] > OPERATIONS // 10, "chunks moved"
    assert (m.graphs[0] > OPERATIONS // 50) == captures
    m.empty()


def test_wiped_memory_of_threads_is_theirs():
    m = stress(OPERATIONS // 2, seed=2, wipe=True)
    assert m.finish() == 0
    m.empty()


def test_the_stress_finds_a_pool_that_does_not_wait(python):
    code = """
        import test_stream_order
        m = test_stream_order.stress(200, seed=1, ignore_streams=True)
        m.device.synchronize_all()
        print("mismatches", m.device.mismatches)
    """
    child = python(code, env=processes.environment(faults=True))
    out, error = child.communicate(timeout=120)
    if child.returncode == 0:
        assert int(out.split()[-1]) > 0, out
    else:
        assert -child.returncode in (signal.SIGSEGV, signal.SIGBUS), error
