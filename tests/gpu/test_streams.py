"""Memory follows the order of the streams: reused without waiting on the host, never before its last use."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("cupy")
import kernels

pytestmark = pytest.mark.gpu
MiB = 2**20
LONG = 0.2  # seconds that a stream is kept busy
SIZE = 64 * MiB


@pytest.fixture(autouse=True)
def loaded():
    kernels.load()


@pytest.fixture
def two(pool):
    """Two streams, on a pool with room for one block of SIZE: what one gets, the other had."""
    pool.limit = SIZE
    return kernels.new_stream(), kernels.new_stream()


class Clock:
    """Seconds that a block of code took on the host."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start

    def was_quick(self):
        """Whether the host cannot have waited for the stream. Under compute-sanitizer every call takes long."""
        return self.seconds < LONG / 10 or kernels.SANITIZED


class Order:
    """The device's time at points of streams, and a count of words that were not what they should be."""

    def __init__(self):
        self.times, self.wrong = kernels.counter(8), kernels.counter()

    def use_slowly(self, stream, address, size, value=7, index=0):
        kernels.fill(stream, address, size, value)
        kernels.spin(stream, LONG)
        kernels.compare(stream, address, size, value, self.wrong)
        kernels.stamp(stream, self.times, index)

    def use(self, stream, address, size, value=9, index=1):
        kernels.stamp(stream, self.times, index)
        kernels.fill(stream, address, size, value)

    def check(self):
        kernels.synchronize()
        times = self.times.get()
        assert int(self.wrong.get()[0]) == 0
        assert times[1] >= times[0] > 0


def test_the_same_stream_gets_the_block_back_at_once(pool, two):
    stream, _ = two
    address = pool.allocate(SIZE, stream=stream.ptr)
    kernels.spin(stream, LONG)
    pool.deallocate(address)
    calls = pool.stats().driver_calls
    with Clock() as clock:
        assert pool.allocate(SIZE, stream=stream.ptr) == address
    assert pool.stats().driver_calls == calls
    assert clock.was_quick()
    pool.deallocate(address)


@pytest.mark.parametrize("size", [SIZE, 3 * MiB + 4])
def test_another_stream_waits_on_the_device_and_not_on_the_host(pool, two, size):
    first, second = two
    pool.limit = (size + 2 * MiB - 1) // (2 * MiB) * 2 * MiB
    order = Order()
    address = pool.allocate(size, stream=first.ptr)
    order.use_slowly(first, address, size)
    with Clock() as clock:
        pool.deallocate(address)
        address = pool.allocate(size, stream=second.ptr)
    order.use(second, address, size)
    assert clock.was_quick()
    order.check()
    pool.deallocate(address)


def test_a_block_without_a_stream_may_have_been_used_on_any(pool, two):
    first, second = two
    order = Order()
    address = pool.allocate(SIZE)
    order.use_slowly(first, address, SIZE)
    pool.deallocate(address)
    address = pool.allocate(SIZE, stream=second.ptr)
    order.use(second, address, SIZE)
    order.check()
    pool.deallocate(address)


def test_a_block_for_no_stream_can_be_used_on_all_at_once(pool, two):
    first, second = two
    order = Order()
    address = pool.allocate(SIZE, stream=first.ptr)
    order.use_slowly(first, address, SIZE)
    pool.deallocate(address)
    address = pool.allocate(SIZE)
    order.use(second, address, SIZE)  # on a stream that the pool was not told of
    order.check()
    pool.deallocate(address)


def test_small_objects_are_ordered_too(pool):
    first, second = kernels.new_stream(), kernels.new_stream()
    pool.limit = 8 * MiB
    order = Order()
    small = [pool.allocate(1000, stream=first.ptr) for _ in range(50)]
    kernels.spin(first, LONG)
    for address in small:
        kernels.fill(first, address, 1000, 5)
    kernels.spin(first, LONG / 4)
    for address in small:
        kernels.compare(first, address, 1000, 5, order.wrong)
        pool.deallocate(address)
    others = [pool.allocate(1000, stream=second.ptr) for _ in range(4000)]
    for address in others:
        kernels.fill(second, address, 1000, 6)
    kernels.synchronize()
    assert int(order.wrong.get()[0]) == 0
    for address in others:
        pool.deallocate(address)


def test_a_stream_that_was_destroyed_before_the_free(pool, two):
    _, second = two
    order = Order()
    doomed = kernels.new_stream()
    address = pool.allocate(SIZE, stream=doomed.ptr)
    order.use_slowly(doomed, address, SIZE)
    del doomed  # its work goes on
    pool.deallocate(address)
    address = pool.allocate(SIZE, stream=second.ptr)
    order.use(second, address, SIZE)
    order.check()
    pool.deallocate(address)


def test_a_stream_that_was_destroyed_after_the_free(pool, two):
    _, second = two
    order = Order()
    doomed = kernels.new_stream()
    address = pool.allocate(SIZE, stream=doomed.ptr)
    order.use_slowly(doomed, address, SIZE)
    pool.deallocate(address)
    del doomed
    address = pool.allocate(SIZE, stream=second.ptr)
    order.use(second, address, SIZE)
    order.check()
    pool.deallocate(address)


def test_a_new_stream_with_the_handle_of_a_destroyed_one_is_another(pool):
    pool.limit = SIZE
    order = Order()
    for _ in range(50):
        old = kernels.new_stream()
        handle = old.ptr
        address = pool.allocate(SIZE, stream=handle)
        kernels.fill(old, address, SIZE, 3)
        kernels.spin(old, 0.01)
        kernels.compare(old, address, SIZE, 3, order.wrong)
        pool.deallocate(address)
        del old
        new = kernels.new_stream()
        again = new.ptr == handle
        address = pool.allocate(SIZE, stream=new.ptr)
        kernels.fill(new, address, SIZE, 4)  # must wait for the old stream's work, same handle or not
        pool.deallocate(address)
        if again:
            break
    kernels.synchronize()
    assert int(order.wrong.get()[0]) == 0
    if not again:
        pytest.skip("the driver never gave a handle twice")


@pytest.mark.parametrize("give_back", ["trim", "limit"])
def test_nothing_is_unmapped_under_queued_work(pool, two, give_back):
    stream, _ = two
    order = Order()
    address = pool.allocate(SIZE, stream=stream.ptr)
    order.use_slowly(stream, address, SIZE)
    pool.deallocate(address)
    if give_back == "trim":
        pool.trim()
    else:
        pool.limit = 2 * MiB
    kernels.synchronize()  # a fault would show here
    assert int(order.wrong.get()[0]) == 0
    pool.trim()
    assert pool.stats().reserved == 0


def test_many_streams_come_and_go(pool):
    pool.limit = SIZE
    for number in range(300):
        stream = kernels.new_stream()
        address = pool.allocate(MiB + number * 4096, stream=stream.ptr)
        kernels.fill(stream, address, MiB, number)
        pool.deallocate(address)
    kernels.synchronize()
    pool.check_invariants()
    pool.trim()
    assert pool.stats().reserved == 0
