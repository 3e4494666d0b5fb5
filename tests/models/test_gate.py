"""The gate: runs together, or one alone, and nobody is left outside."""

import contextlib
import random
import signal
import threading
import time

import pytest

from glake_infer.models.gate import Gate

SHORT = 0.05
"""Seconds after which who has not come through is taken to wait."""


class Guest:
    """A thread that goes in, stays until it is told to leave, and says what `crowded()` was then."""

    def __init__(self, gate, way):
        self.inside, self.leave, self.left = threading.Event(), threading.Event(), threading.Event()
        self.crowded = None
        threading.Thread(target=self._visit, args=(getattr(gate, way),), daemon=True).start()

    def _visit(self, way):
        with way() as crowded:
            self.inside.set()
            self.leave.wait(20)
            self.crowded = crowded() if crowded else None
        self.left.set()

    def is_inside(self):
        return self.inside.wait(20)

    def waits(self):
        return not self.inside.wait(SHORT)

    def go(self):
        self.leave.set()
        assert self.left.wait(20)
        return self.crowded


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def enter(gate):
    guests = []

    def visit(way):
        guests.append(Guest(gate, way))
        return guests[-1]

    yield visit
    for guest in guests:
        guest.leave.set()
    assert all(guest.left.wait(20) for guest in guests)
    assert (gate._inside, gate._alone) == (0, 0)


def test_runs_go_through_together(enter):
    guests = [enter("together") for _ in range(8)]
    assert all(guest.is_inside() for guest in guests)


def test_alone_waits_for_those_inside_and_new_ones_wait_for_it(enter):
    first, second = enter("together"), enter("together")
    assert first.is_inside()
    assert second.is_inside()
    alone = enter("alone")
    assert alone.waits()
    late = enter("together")
    assert late.waits()  # or alone would never get in
    first.go()
    assert alone.waits()
    second.go()
    assert alone.is_inside()
    assert late.waits()
    alone.go()
    assert late.is_inside()


def test_several_that_want_to_be_alone_come_one_after_the_other_before_new_runs(enter):
    first = enter("together")
    assert first.is_inside()
    alone = [enter("alone") for _ in range(3)]
    assert all(guest.waits() for guest in alone)
    late = enter("together")
    first.go()
    for _ in range(3):
        inside = wait_for_one(alone)
        assert not late.inside.is_set()
        assert not any(other.inside.is_set() for other in alone if other is not inside)
        inside.go()
        alone.remove(inside)
    assert late.is_inside()


def wait_for_one(guests):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if inside := [guest for guest in guests if guest.inside.is_set()]:
            time.sleep(SHORT)
            return inside[0]
        time.sleep(0.001)
    raise AssertionError("none came in")


class TestCrowded:
    def test_by_itself(self, enter):
        for _ in range(3):
            guest = enter("together")
            assert guest.is_inside()
            assert guest.go() is False

    def test_others_were_there_before(self, enter):
        before, guest = enter("together"), None
        assert before.is_inside()
        guest = enter("together")
        assert guest.is_inside()
        assert before.go() is True
        assert guest.go() is True  # although it is by itself now

    def test_another_came_and_went(self, enter):
        guest = enter("together")
        assert guest.is_inside()
        other = enter("together")
        assert other.is_inside()
        other.go()
        assert guest.go() is True

    def test_others_that_still_wait_do_not_count(self, gate, enter):
        guest = enter("together")
        assert guest.is_inside()
        alone = enter("alone")
        assert alone.waits()
        late = enter("together")
        assert late.waits()
        assert guest.go() is False
        assert alone.is_inside()
        alone.go()
        assert late.is_inside()
        assert late.go() is False

    def test_it_changes_while_one_is_inside(self, gate):
        with gate.together() as crowded:
            assert not crowded()
            with gate.together() as nested:
                assert nested()
                assert crowded()
            assert crowded()


@pytest.mark.parametrize("way", ["together", "alone"])
def test_an_error_inside_lets_the_others_through(gate, enter, way):
    with pytest.raises(ValueError, match="inside"), getattr(gate, way)():
        raise ValueError("inside")
    assert enter("alone").is_inside()


@pytest.mark.parametrize("way", ["together", "alone"])
def test_an_interrupt_while_waiting_lets_the_others_through(gate, enter, way):
    """Ctrl-C, or the alarm of a timeout."""
    guest = enter("together" if way == "alone" else "alone")
    assert guest.is_inside()

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    timer = threading.Timer(SHORT, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt), getattr(gate, way)():
            pass
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    guest.go()
    waiting = gate._alone
    gate._alone = 0  # so that this test ends in any case
    assert waiting == 0
    assert enter("together").is_inside()


def test_any_order(gate):
    """Threads that go in either way never meet one that is alone, and all come through."""
    inside, problems = [], []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(60):
                alone = rng.random() < 0.3
                with gate.alone() if alone else gate.together() as crowded:
                    inside.append(alone)
                    seen = list(inside)
                    if rng.random() < 0.5:
                        time.sleep(0.0005)
                    seen += inside
                    if alone:
                        assert seen == [True, True]
                    else:
                        assert True not in seen
                        assert len(seen) == 2 or crowded()
                    inside.remove(alone)
        except BaseException as error:
            problems.append(error)
            with contextlib.suppress(ValueError):
                inside.remove(alone)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not problems, problems[0]
    assert not any(thread.is_alive() for thread in threads)
    assert (gate._inside, gate._alone) == (0, 0)
