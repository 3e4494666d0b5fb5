import os
import signal

import pytest
from blake3 import blake3

from glake_infer import digest
from glake_infer.digest import digest_of, digest_of_file, digest_of_range, is_digest, pieces_of

DATA = bytes(range(256)) * 40


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "PIECE", 1000)
    path = tmp_path / "data"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    yield path, fd
    os.close(fd)


def test_is_blake3():
    assert (
        digest_of(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )  # the paper's vector
    assert digest_of(memoryview(DATA)) == digest_of(bytearray(DATA)) == blake3(DATA).hexdigest()


def test_files_and_ranges(file):
    path, fd = file
    assert digest_of_file(path) == digest_of(DATA)
    seen = []
    assert digest_of_range(fd, 300, 2500, seen.append) == (digest_of(DATA[300:2800]), 2500)
    assert seen == [1000, 1000, 500]
    assert digest_of_range(fd, 300, 0) == (digest_of(b""), 0)
    with pytest.raises(FileNotFoundError):
        digest_of_file(path.with_name("absent"))


def test_in_a_child_of_fork():
    """The threads that computed the parent's digests are not there."""
    data = bytes(16 << 20)
    expected = digest_of(data)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        os._exit(digest_of(data) != expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_range_past_the_end_says_how_much_there_was(file):
    _, fd = file
    assert digest_of_range(fd, len(DATA) - 10, 50) == (digest_of(DATA[-10:]), 10)
    assert b"".join(bytes(piece) for piece in pieces_of(fd, len(DATA) - 1500, 9999)) == DATA[-1500:]
    assert list(pieces_of(fd, len(DATA) + 5, 7)) == []


@pytest.mark.parametrize(
    "text", ["", "ab", "g" * 64, "A" * 64, "../" + "a" * 61, "a" * 63 + "\n", "a" * 65, "٣" * 64]
)
def test_what_is_no_digest(text):
    assert not is_digest(text)


def test_what_is_a_digest():
    assert is_digest(digest_of(b"x"))
