"""Checks beside the use of files: once while a file is unchanged, as early and as soon ended as can be."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from stored_weights import wanted

import glake_infer as gi
from glake_infer import checking, verified
from glake_infer.checking import AlteredObjectError, Checker
from glake_infer.residency import Residency
from glake_infer.verified import ATTEMPTS

MiB = 1 << 20


@pytest.fixture
def old(monkeypatch):
    """What was written this moment counts as old enough to be recorded."""
    monkeypatch.setattr(verified, "RACY", 0)


@pytest.fixture
def files(store):
    return [wanted(store.objects, os.urandom(3000 + n)).file for n in range(5)]


@pytest.fixture
def read(monkeypatch):
    """The paths of files that are read, in any order; `read.at(path)`: called when one begins to be read."""

    class Read(list):
        at = staticmethod(lambda path: None)

    found, original = Read(), checking.examine

    def examine(fd, *arguments, **more):
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        found.append(path)
        found.at(path)
        return original(fd, *arguments, **more)

    monkeypatch.setattr(checking, "examine", examine)
    return found


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [t for t in threading.enumerate() if t.name.startswith("check ")] == []


def spoil(file, at=-1):
    data = bytearray(file.path.read_bytes())
    data[at] ^= 1
    file.path.unlink()
    file.path.write_bytes(data)


def test_a_file_is_read_once_while_it_is_unchanged(files, read, old):
    checker = Checker()
    checker.check(files)
    assert sorted(read) == sorted(str(file.path) for file in files)
    read.clear()
    checker.check(files)
    Checker().check(files)  # of another process
    assert not read
    os.utime(files[3].path)
    checker.check(files)
    Checker().check(files)  # a file that shows no time of change of its own is not recorded
    assert read == [str(files[3].path)] * 2


def test_what_has_just_changed_is_only_remembered(files, read, store):
    checker = Checker()
    for _ in range(2):
        checker.check(files)
        assert len(read) == len(files)
    assert not (store.root / "verified").exists()
    Checker().check(files)
    assert len(read) == 2 * len(files)


def test_every_process_checks_anew_where_that_is_wanted(files, read, old, monkeypatch, store):
    Checker().check(files[:3])
    size = (store.root / "verified").stat().st_size
    monkeypatch.setenv("GLAKE_VERIFY", "always")
    read.clear()
    for _ in range(2):
        checker = Checker()
        checker.check(files)
        checker.check(files)
    assert len(read) == 2 * len(files)
    assert (store.root / "verified").stat().st_size == size


@pytest.mark.parametrize("value", ["never", "ALWAYS", "1"])
def test_another_word_is_an_error(files, monkeypatch, value):
    monkeypatch.setenv("GLAKE_VERIFY", value)
    for call in ("look", "check", "begin"):
        with pytest.raises(gi.InputError, match=rf"GLAKE_VERIFY='{value}': expected 'once'.*'always'"):
            getattr(Checker(), call)(files)


def test_a_mismatch_is_found_wherever_it_is(store, old, read):
    files = [wanted(store.objects, os.urandom(3 * MiB + 5)).file for _ in range(4)]
    spoil(files[-1])
    for _ in range(2):
        with pytest.raises(AlteredObjectError) as caught:
            Checker().check(files)
        assert caught.value.digest == files[-1].digest
    assert read.count(str(files[-1].path)) == 2
    assert len(read) <= 5 + 3  # those found right before are known


def test_looking_reads_nothing(files, read):
    spoil(files[0])
    Checker().look(files)
    assert not read
    files[1].path.unlink()
    with pytest.raises(AlteredObjectError, match="cannot be read: No such file") as caught:
        Checker().look(files)
    assert caught.value.unreadable
    files[0].path.write_bytes(b"short")
    with pytest.raises(AlteredObjectError, match="does not hold the bytes"):
        Checker().look(files)


def test_work_goes_on_beside_the_checks(files, read):
    begun, seen = threading.Event(), []
    read.at = lambda path: begun.wait(10)
    Checker().beside(files, lambda failed: (seen.append(True), begun.set()))
    assert seen == [True]
    assert len(read) == len(files)


def test_an_error_of_the_work_ends_the_checks(store, read):
    files = [wanted(store.objects, os.urandom(MiB)).file for _ in range(60)]
    read.at = lambda path: time.sleep(0.05)
    with pytest.raises(ZeroDivisionError):
        Checker().beside(files, lambda failed: 1 / 0)
    assert len(read) <= checking.THREADS


def test_a_mismatch_is_known_while_the_work_goes_on(files):
    spoil(files[0])
    checker = Checker()
    with checker.begin(files) as checks:
        until = time.monotonic() + 10
        while not checks.failed and time.monotonic() < until:
            time.sleep(0.001)
        assert checks.failed
        with pytest.raises(AlteredObjectError):
            checks.result()


def test_ctrl_c_ends_them_soon(store, read):
    files = [wanted(store.objects, os.urandom(MiB)).file for _ in range(60)]
    read.at = lambda path: time.sleep(0.05)
    timer = threading.Timer(0.1, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        Checker().check(files)
    timer.join()
    assert len(read) < len(files)


def test_a_large_file_is_stopped_within_a_piece(store, monkeypatch):
    file, pieces = wanted(store.objects, bytes(64 * MiB)).file, []
    begun, stopped = threading.Event(), threading.Event()
    original = checking.Checking._go_on

    def go_on(self, done):
        pieces.append(done)
        begun.set()
        stopped.wait(10)
        original(self, done)

    monkeypatch.setattr(checking.Checking, "_go_on", go_on)
    checks = Checker().begin([file])
    begun.wait(10)
    threading.Timer(0.1, stopped.set).start()
    checks.cancel()
    assert len(pieces) == 1


@pytest.mark.parametrize("times", [1, ATTEMPTS])
def test_a_file_that_is_replaced_meanwhile_is_read_again(files, times):
    """By the same bytes: what was read may be neither the old nor the new ones."""
    data, calls = files[2].path.read_bytes(), []

    def work(failed):
        calls.append(1)
        if len(calls) <= times:
            files[2].path.unlink()
            files[2].path.write_bytes(data)

    checker = Checker()
    checker.check(files)
    if times == ATTEMPTS:
        with pytest.raises(AlteredObjectError) as caught:
            checker.beside(files, work)
        assert caught.value.digest == files[2].digest
    else:
        checker.beside(files, work)
        assert len(calls) == 2


def test_a_file_that_is_altered_or_gone_after_its_check_is_found(files):
    checker = Checker()
    with pytest.raises(AlteredObjectError, match="does not hold the bytes"):
        checker.beside(files, lambda failed: spoil(files[1]))
    with pytest.raises(AlteredObjectError, match="No such file"):
        checker.beside(files[:1], lambda failed: files[0].path.unlink())


def test_a_wrong_file_that_is_mended_before_its_check_does_not_pass_for_what_was_copied(files, read):
    """The copy read the wrong bytes, and the check the right ones."""
    right, copied = files[0].path.read_bytes(), []
    spoil(files[0])
    read_first = threading.Event()
    original = checking.Checking._check

    def late(self, file, seal):
        read_first.wait(10)
        original(self, file, seal)

    def work(failed):
        copied.append(files[0].path.read_bytes())
        if not read_first.is_set():
            files[0].path.unlink()
            files[0].path.write_bytes(right)
            read_first.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking.Checking, "_check", late)
        Checker().beside(files[:1], work)
    assert copied[-1] == right
    assert len(copied) == 2


def test_without_threads_the_caller_checks(files, read, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    Checker().check(files)
    assert len(read) == len(files)


def test_a_few_large_files_have_the_threads_of_blake3(store, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    large, *small = (wanted(store.objects, os.urandom(size)).file for size in (5 * MiB, MiB, MiB, MiB, MiB))
    alone, original = {}, checking.examine

    def examine(fd, digest, *rest, **more):
        alone[digest] = more["alone"]
        return original(fd, digest, *rest, **more)

    monkeypatch.setattr(checking, "examine", examine)
    Checker().check([large, *small])
    assert alone == {large.digest: False, **{file.digest: True for file in small}}


COLD = """
import sys
import glake_infer as gi
from glake_infer import verified
from glake_infer.residency import Residency, Wanted
verified.RACY = 0
def rchar():
    return int(open("/proc/self/io").read().split()[1])
store, size = gi.Store(), 8 << 20
items = [Wanted(digest, size, size, store.objects) for digest in sys.argv[2:]]
holding = Residency.of(gi.Pool("cpu"), copies=sys.argv[1] == "copies").hold(items, 1)
before = rchar()
with holding:
    print((rchar() - before) / (size * len(items)))
"""


@pytest.mark.parametrize(("how", "first", "later"), [("copies", 2, 1), ("files", 1, 0)])
def test_a_cold_process_reads_unchanged_files_once(store, python, monkeypatch, how, first, later):
    digests = [store.objects.add_buffer(os.urandom(8 * MiB))[0] for _ in range(3)]

    def times():
        process = python(COLD, how, *digests)
        out, complaints = process.communicate()
        assert process.returncode == 0, complaints
        return float(out)

    assert times() == pytest.approx(first, abs=0.05)
    assert times() == pytest.approx(later, abs=0.05)
    store.objects.path(digests[0]).touch()
    assert times() == pytest.approx(later + 1 / 3, abs=0.05)
    monkeypatch.setenv("GLAKE_VERIFY", "always")
    assert times() == pytest.approx(first, abs=0.05)


class TestResidency:
    """What is left of a load that finds wrong bytes."""

    @pytest.fixture
    def pool(self):
        with gi.Pool(device="cpu", limit="256MiB") as pool:
            yield pool
            pool.check_invariants()

    @pytest.mark.parametrize("copies", [True, False])
    def test_a_mismatch_in_the_last_piece_leaves_nothing(self, store, pool, copies):
        table = Residency.of(pool, copies=copies)
        items = [wanted(store.objects, os.urandom(9 * MiB + n), group=n) for n in range(4)]
        right = items[-1].file.path.read_bytes()
        spoil(items[-1].file)
        holding = table.hold(items, 1)
        for _ in range(2):
            with pytest.raises(AlteredObjectError) as caught, holding:
                pytest.fail("it was used")
            assert caught.value.digest == items[-1].digest
            assert pool.stats().active == 0
        items[-1].file.path.write_bytes(right)
        with holding:
            assert pool.stats().active >= 36 * MiB
        holding.close()

    def test_a_mismatch_in_the_rest_of_a_granule(self, store, pool):
        """It is written into a chunk that others use meanwhile."""
        table = Residency.of(pool, copies=True)
        first, second = (wanted(store.objects, os.urandom(3000 + n)) for n in range(2))
        one, two = table.hold([first], 1), None
        with one:
            two = table.hold([second], 2)
            assert one.chunks == two.chunks
            right = second.file.path.read_bytes()
            spoil(second.file)
            with pytest.raises(AlteredObjectError), two:
                pytest.fail("it was used")
            second.file.path.write_bytes(right)
            with two:
                assert ctypes.string_at(two.addresses[second.digest], len(right)) == right
        one.close()
        two.close()

    def test_what_others_map_by_themselves_is_checked_where_it_is_there_already(self, store, pool):
        table = Residency.of(pool, copies=False)
        item = wanted(store.objects, os.urandom(MiB), by_file=True)
        holding = table.hold([item], 1)
        with holding:
            spoil(item.file)
            with pytest.raises(AlteredObjectError):
                table.hold([item], 2)
        holding.close()
