"""The operating system's figures: what is mapped twice counts once, what is unmapped in our memfds counts too."""

import mmap

import pytest

import glake_infer as gi
from glake_infer.process_memory import measure, release_unused_heap

pytestmark = pytest.mark.clock  # pages of libraries count by how many processes have them

SIZE = 32 << 20
SLACK = 4 << 20


def test_memory_of_the_heap_is_private():
    piece = b"\1" * (1 << 20)
    release_unused_heap()
    before = measure()
    held = mmap.mmap(-1, SIZE)
    for _ in range(SIZE >> 20):
        held.write(piece)
    after = measure()
    held.close()
    assert after.private - before.private == pytest.approx(SIZE, abs=SLACK)
    assert after.files - before.files == pytest.approx(0, abs=SLACK)
    assert measure().total - before.total == pytest.approx(0, abs=SLACK)


def test_a_file_mapped_twice_counts_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\1" * SIZE)
    before = measure()
    with path.open("rb") as file:
        maps = [mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ) for _ in range(2)]
        for mapped in maps:
            sum(mapped[::4096])
        after = measure()
        for mapped in maps:
            mapped.close()
    assert after.files - before.files == pytest.approx(SIZE, abs=SLACK)
    assert after.private - before.private == pytest.approx(0, abs=SLACK)


def test_memory_of_the_pool_counts_until_it_is_trimmed():
    import ctypes

    with gi.Pool(device="cpu", limit="64MiB") as pool:
        release_unused_heap()
        before = measure()
        address = pool.allocate(SIZE)
        ctypes.memset(address, 1, SIZE)
        assert measure().pool - before.pool == pytest.approx(SIZE, abs=SLACK)
        assert measure().total - before.total == pytest.approx(SIZE, abs=SLACK)
        pool.deallocate(address)
        assert measure().total - before.total == pytest.approx(SIZE, abs=SLACK)  # idle memory is memory
        pool.trim()
        assert measure().total - before.total == pytest.approx(0, abs=SLACK)
