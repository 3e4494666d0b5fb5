"""The format of traces: read, checked, written."""

import gzip
import random

import pytest

from glake_infer.allocators import InputError, trace

GOOD = """# a comment
a 7 100 -1
r 9 4000 12

a 8 50 3
f 7 100 -1
f 9 0 -1
a 7 60 12
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="x.trace"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["x.trace", "x.trace.gz"])
def test_a_trace_is_read(written, name):
    found = trace.read(written(GOOD, name))
    assert found.name == "x"
    assert bytes(found.operations) == b"araffa"
    assert found.bytes.tolist() == [100, 4000, 50, 100, 4000, 60]  # a free says what it frees
    assert found.streams.tolist() == [-1, 0, 1, -1, -1, 0]
    assert (found.stream_count, found.allocations) == (2, 4)
    assert (found.peak_requested, found.live_bytes) == (4150, 110)
    assert len(found) == 6


def test_slots_of_live_allocations_differ_and_are_few():
    rng = random.Random(1)
    steps, alive = [], []
    for name in range(2000):
        steps.append(("a", name, rng.randrange(100), -1))
        alive.append(name)
        while len(alive) > rng.randrange(20):
            steps.append(("f", alive.pop(rng.randrange(len(alive))), 0, -1))
    found = trace.from_steps(steps)
    holds = {}
    for (op, name, _, _), slot in zip(steps, found.slots.tolist(), strict=True):
        if op == "a":
            assert slot not in holds
            holds[slot] = name
        else:
            assert holds.pop(slot) == name
    assert found.slots.max() < 25


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("x 1 2 -1", "there is no operation 'x'"),
        ("a 1 2", "3 fields instead of 4"),
        ("a 1 2 3 4", "5 fields instead of 4"),
        ("a 1 2.5 -1", "no whole numbers"),
        ("a 1 -2 -1", "id and bytes are at least 0"),
        ("a -1 2 -1", "id and bytes are at least 0"),
        ("a 1 2 -2", "a stream at least -1"),
        (f"a 1 {2**62} -1", "below 2**62"),
        ("a 0 2 -1", "id 0 is allocated again"),
        ("r 0 2 -1", "id 0 is allocated again"),
        ("f 5 2 -1", "id 5 is freed and not alive"),
        ("f 0 9 -1", "id 0 was allocated with 10 bytes"),
    ],
)
def test_a_bad_line_is_named(written, line, what):
    path = written(f"a 0 10 -1\n\n{line}\n")
    with pytest.raises(InputError) as error:
        trace.read(path)
    assert f"{path}, line 3: " in str(error.value)
    assert what in str(error.value)
    assert "expected `op id bytes stream`" in str(error.value)


def test_a_second_free_is_refused(written):
    with pytest.raises(InputError, match="line 3: id 1 is freed and not alive"):
        trace.read(written("a 1 10 -1\nf 1 10 -1\nf 1 10 -1\n"))


def test_files_that_are_no_traces(written, tmp_path):
    with pytest.raises(InputError, match="there is no trace"):
        trace.read(tmp_path / "none.trace")
    whole = written(GOOD * 1, "cut.trace.gz")
    whole.write_bytes(whole.read_bytes()[:-12])
    for path in (
        whole,
        written("not compressed", "y.trace").rename(tmp_path / "y.trace.gz"),
        tmp_path,
    ):
        with pytest.raises(InputError, match="cannot be read"):
            trace.read(path)
    binary = tmp_path / "b.trace"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="cannot be read"):
        trace.read(binary)


@pytest.mark.parametrize("name", ["x.trace", "x.trace.gz"])
def test_what_is_written_is_read_again(tmp_path, name):
    steps = [("a", 0, 5, -1), ("r", 1, 6, 0), ("f", 0, 5, -1)]
    path = trace.write(tmp_path / name, steps, "made\nhere")
    assert list(map(tuple, trace.read(path).steps())) == steps
    first = path.read_bytes()
    assert trace.write(path, steps, "made\nhere").read_bytes() == first  # no time stamp in it
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = trace.write(tmp_path / "x.trace", [("a", 0, 5, -1)])

    def broken():
        yield ("f", 0, 5, -1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trace.write(path, broken())
    assert path.read_text() == "a 0 5 -1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_trace(written):
    found = trace.read(written("# nothing\n"))
    assert (len(found), found.peak_requested, found.live_bytes) == (0, 0, 0)
