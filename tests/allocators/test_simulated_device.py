"""The simulated device behaves as CUDA was measured to (simulated_streams.hpp); the pool's tests lean on it."""

from __future__ import annotations

import time

import pytest

from glake_infer.allocators import _native
from glake_infer.allocators.errors import DriverError

MS = 1000  # microseconds


class Device:
    def __init__(self):
        self.streams = _native.SimulatedDevice()
        self.memory = self.streams.memory()
        self.size = self.memory.granularity
        self.address = self.memory.reserve(self.size)
        self.handle = self.memory.create(self.size)
        self.memory.map(self.address, self.handle, self.size)


@pytest.fixture
def device():
    device = Device()
    yield device
    device.streams.synchronize_all()
    device.memory.unmap(device.address, device.size)
    device.memory.destroy(device.handle, device.size)
    device.memory.release(device.address, device.size)


def test_a_stream_does_its_work_in_order_and_later(device):
    streams = device.streams
    stream = streams.new_stream()
    streams.enqueue_fill(stream, device.address, device.size, 1, 50 * MS)
    assert device.memory.read(device.address, 1) == b"\x00"
    device.memory.fill(device.address, device.size, 2, stream)
    streams.enqueue_check(stream, device.address, device.size, 2)
    streams.synchronize_stream(stream)
    assert device.memory.read(device.address, 2) == b"\x02\x02"
    assert streams.mismatches == 0


def test_streams_without_an_event_between_them_are_caught(device):
    streams = device.streams
    one, two = streams.new_stream(), streams.new_stream()
    streams.enqueue_fill(one, device.address, device.size, 1)
    streams.enqueue_delay(one, 100 * MS)
    streams.enqueue_check(one, device.address, device.size, 1)
    streams.enqueue_fill(two, device.address, device.size, 2, 30 * MS)
    assert streams.synchronize_all()
    assert streams.mismatches == device.size


@pytest.mark.clock
@pytest.mark.parametrize("every", [False, True])
def test_an_event_orders_streams(device, every):
    streams = device.streams
    one, two, event = streams.new_stream(), streams.new_stream(), streams.create_event()
    assert streams.finished(event)
    streams.enqueue_fill(one, device.address, device.size, 1)
    streams.enqueue_delay(one, 50 * MS)
    streams.enqueue_check(one, device.address, device.size, 1)
    streams.record_all(event) if every else streams.record(event, one)
    streams.enqueue_delay(one, 200 * MS)  # not part of the event
    assert not streams.finished(event)
    streams.wait(two, event)
    streams.enqueue_fill(two, device.address, device.size, 2)
    start = time.monotonic()
    streams.synchronize(event)
    assert time.monotonic() - start < 0.2
    assert streams.finished(event)
    assert streams.synchronize_all()
    assert (streams.mismatches, streams.misuses) == (0, 0)
    streams.destroy_event(event)


def test_an_event_outlives_its_stream_and_the_handle_is_used_again(device):
    streams = device.streams
    stream, event = streams.new_stream(), streams.create_event()
    before = streams.state(stream)
    streams.enqueue_fill(stream, device.address, device.size, 1, 50 * MS)
    streams.record(event, stream)
    streams.destroy_stream(stream)
    assert not streams.finished(event)
    streams.synchronize(event)
    assert device.memory.read(device.address, 1) == b"\x01"
    assert streams.misuses == 0
    assert streams.state(stream) is None, "CUDA crashes here"
    assert streams.misuses == 1
    assert streams.new_stream() == stream
    assert streams.state(stream) != before


def test_a_graph_does_its_work_when_it_is_launched(device):
    streams = device.streams
    stream, other = streams.new_stream(), streams.new_stream()
    outside = streams.state(stream)
    capture = streams.begin_capture(stream)
    state = streams.state(stream)
    assert state[1] == capture != 0
    assert state[0] != outside[0]
    streams.enqueue_fill(stream, device.address, device.size, 3, 50 * MS)
    flag = streams.watch_graph(stream)
    assert not streams.synchronize_all()
    graph = streams.end_capture(stream)
    assert streams.state(stream) == outside
    streams.synchronize_stream(stream)
    assert device.memory.read(device.address, 1) == b"\x00"
    streams.launch_graph(graph, other)
    streams.launch_graph(graph, other)
    streams.destroy_graph(graph)
    assert not flag.dead, "it is still running"
    streams.synchronize_stream(other)
    assert device.memory.read(device.address, 1) == b"\x03"
    streams.enqueue_delay(other, 0)
    streams.synchronize_stream(other)  # the last launch has let go of the graph
    assert flag.dead
    assert streams.misuses == 0


@pytest.mark.parametrize("call", ["record", "wait", "record_all", "synchronize"])
def test_what_breaks_a_capture_is_refused_counted_and_breaks_it(device, call):
    streams = device.streams
    stream, event = streams.new_stream(), streams.create_event()
    streams.begin_capture(stream)
    flag = streams.watch_graph(stream)
    calls = {
        "record": lambda: streams.record(event, stream),
        "wait": lambda: streams.wait(stream, event),
        "record_all": lambda: streams.record_all(event),
        "synchronize": lambda: streams.synchronize_stream(stream),
    }
    with pytest.raises(DriverError, match="break the capture"):
        calls[call]()
    assert streams.misuses == 1
    assert streams.end_capture(stream) == 0
    assert flag.dead
    streams.record(event, stream)  # and the stream works again
    streams.synchronize(event)
