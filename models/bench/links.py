"""The links of GPUs: what they are, and what copies by size and number of paths reach."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glake_infer import cuda
from glake_infer.allocators.devices import parse_device
from glake_infer.allocators.errors import DeviceNotFoundError, DriverError, InputError
from glake_infer.allocators.sizes import parse_bytes
from glake_infer.models.progress import Progress
from glake_infer.transfers import paths
from glake_infer.transfers.paths import STAGING, LinkReport, engine_over
from glake_infer.transfers.settings import SLOT, transfer_settings

if TYPE_CHECKING:
    from glake_infer.allocators import _native

SIZES = tuple(1 << power for power in range(20, 31, 2))
"""1 MiB to 1 GiB."""

LEAST = 0.02
"""Seconds that the copies of one size take at least: small ones are repeated."""

MOST = 50

Link = tuple[int, int, int] | None


@dataclass(frozen=True)
class LinksReport:
    """The links of all GPUs that this process sees, and how it would use them."""

    links: tuple[LinkReport, ...]
    gpus: int
    note: str
    """Where there is nothing to measure, why."""
    size: int
    in_flight_bound: int
    """The most bytes between files and GPUs at once."""
    locked: bool | None
    """Whether host memory can be page-locked; None without a GPU."""
    paths: str
    """The setting (GLAKE_PATHS): "own", "auto" or "all"."""
    used: dict[str, tuple[str, ...]]
    """Device -> the devices whose links a transfer to it may take by that setting. For "auto": if there are pools."""
    figures_file: str
    figures_kept: bool
    """Whether figures are on disk already."""


def examine_links(*, size: int | str = 1 << 30, progress: Progress | None = None) -> LinksReport:
    """Measure all paths of all GPUs with copies of `size` bytes; without a GPU there are none.

    Raises DeviceNotFoundError (no driver), InputError, DriverError, OutOfMemoryError.
    """
    from glake_infer.allocators import _native

    count = parse_bytes(size)
    if count < SLOT:
        raise InputError(f"--size {size}: expected {SLOT} bytes or more, to measure a rate.")
    settings = transfer_settings()
    try:
        gpus = _native.cuda_device_count()
    except DriverError as error:
        raise DeviceNotFoundError(f"there are no links to measure: {error}") from error
    found, locked, note = list[LinkReport](), None, ""
    if gpus:
        locked = can_lock()
        found = paths.survey(size=count, progress=progress)
    else:
        note = "no GPU: the driver is here and shows none to this process, so there are no links."
    file = paths.figures_file()
    return LinksReport(
        links=tuple(found),
        gpus=gpus,
        note=note,
        size=count,
        in_flight_bound=settings.in_flight,
        locked=locked,
        paths=settings.paths,
        used=used_links(found, settings.paths),
        figures_file=str(file),
        figures_kept=file.exists(),
    )


def can_lock() -> bool:
    """Whether host memory can be page-locked for GPUs. Raises DriverError."""
    engine = engine_over(0, [])
    address, locked = engine.take_buffer(SLOT)
    engine.give_buffer(address)
    return locked


def used_links(links: Sequence[LinkReport], setting: str) -> dict[str, tuple[str, ...]]:
    """The links that transfers to each device may take by a setting of `paths`."""
    found: dict[str, tuple[str, ...]] = {}
    for link in links:
        own = link.via == link.device
        if own or (setting != "own" and link.peer_access):
            found[link.device] = (*found.get(link.device, ()), link.via)
    return found


@contextlib.contextmanager
def links_of(index: int, *, all_paths: bool) -> Iterator[list[Link]]:
    """Yield a GPU's own link and, where asked, those by all its peers, with buffers there. Raises DriverError."""
    from glake_infer.allocators import _native

    links: list[Link] = [None]
    staged: list[tuple[_native.Pool, int]] = []
    try:
        for peer in range(paths.gpu_count()) if all_paths else ():
            if peer != index and _native.cuda_peers(index, peer):
                pool = _native.device_pool(f"cuda:{peer}")
                address = pool.allocate(STAGING, "workspace", -1)
                staged.append((pool, address))
                links.append((peer, address, STAGING))
        yield links
    finally:
        for pool, address in staged:
            pool.deallocate(address)


@dataclass(frozen=True)
class LinkRate:
    """Copies of one size over so many paths. Bytes per second, medians."""

    device: str
    bytes: int
    paths: int
    to_device: float
    """Through our engine, from page-locked memory."""
    to_host: float
    ratio_to_device: float
    """To that of one path."""
    ratio_to_host: float
    raw_to_device: float
    """As many bytes in all, a share of them by one plain copy to each of so many GPUs at once: what the links give."""
    raw_to_host: float


def bench_links(
    device: str = "cuda:0",
    *,
    sizes: Sequence[int] = SIZES,
    repeat: int = 5,
    progress: Progress | None = None,
) -> list[LinkRate]:
    """Copy over one path, and over two, three, ... all paths of a GPU.

    Raises InputError (the CPU has no links), DeviceNotFoundError, DriverError, OutOfMemoryError.
    """
    device = parse_device(device)
    if device == "cpu":
        raise InputError("--device cpu: the CPU has no links. Expected a GPU, as cuda:0.")
    if repeat < 1:
        raise InputError(f"repeat={repeat}: expected 1 or more.")
    index, largest = int(device.removeprefix("cuda:")), max(sizes)
    with links_of(index, all_paths=True) as links:
        engine = engine_over(index, links)
        with _Raw(index, [link[0] for link in links if link], largest, engine) as raw:
            return curve(
                device,
                engine,
                index,
                (raw.host, raw.places[index]),
                sizes,
                len(links),
                repeat,
                raw.copy,
                progress,
            )


def curve(
    device: str,
    engine: _native.TransferEngine,
    target: int,
    memory: tuple[int, int],
    sizes: Sequence[int],
    count: int,
    repeat: int,
    raw: Callable[[int, int, bool], float],
    progress: Progress | None = None,
) -> list[LinkRate]:
    """Time copies between `memory` (the host's, the device's) of each of `sizes` over one to `count` paths of an engine.

    `raw(bytes, paths, to the device)` takes the seconds of the same by plain copies. Raises DriverError.
    """
    host, address = memory

    def copy(size: int, used: int, down: bool) -> float:
        start = time.perf_counter()
        transfer = engine.copy(target, down, [(host, address, size)], 0, used)
        while not transfer.wait(1):
            pass
        taken = time.perf_counter() - start
        view = transfer.view()
        if view["link_error"] or view["lost_links"]:
            raise DriverError(view["link_error"] or view["lost_links"][0])
        return taken

    found: list[LinkRate] = []
    for number, size in enumerate(sizes):
        one: tuple[float, float] = (0.0, 0.0)
        for used in range(1, count + 1):
            if progress:
                progress("copies", number * count + used - 1, len(sizes) * count)
            down, up, raw_down, raw_up = (
                size / _median(each, size, used, to_device, repeat)
                for each in (copy, raw)
                for to_device in (True, False)
            )
            if used == 1:
                one = down, up
            found.append(LinkRate(device, size, used, down, up, down / one[0], up / one[1], raw_down, raw_up))
    return found


def _median(copy: Callable[[int, int, bool], float], size: int, used: int, down: bool, repeat: int) -> float:
    copy(size, used, down)
    times: list[float] = []
    while len(times) < repeat or (sum(times) < LEAST and len(times) < MOST):
        times.append(copy(size, used, down))
    return statistics.median(times)


class _Raw:
    """Plain copies by the driver to several GPUs at once, each over its own link to its own memory."""

    def __init__(self, index: int, peers: Sequence[int], size: int, engine: _native.TransferEngine) -> None:
        """Nothing is taken before `with`."""
        self._engine, self._size = engine, size
        self._gpus = [index, *peers]
        self._stack = contextlib.ExitStack()
        self.places: dict[int, int] = {}
        self._streams: dict[int, int] = {}
        self.host = 0

    def __enter__(self) -> _Raw:
        from glake_infer.allocators import _native

        with contextlib.ExitStack() as stack:
            self.host, _ = self._engine.take_buffer(self._size)
            stack.callback(self._engine.give_buffer, self.host)
            for number, gpu in enumerate(self._gpus):
                pool = _native.device_pool(f"cuda:{gpu}")
                place = pool.allocate(self._size if not number else self._size // 2, "workspace", -1)
                stack.callback(pool.deallocate, place)
                self.places[gpu] = place
                self._streams[gpu] = cuda.new_stream(gpu)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def copy(self, size: int, used: int, down: bool) -> float:
        """Seconds until all have their share of `size` bytes."""
        gpus = self._gpus[:used]
        share = size // used
        queue = cuda.queue_to_device if down else cuda.queue_to_host
        start = time.perf_counter()
        for number, gpu in enumerate(gpus):
            ends = (self.places[gpu], self.host + number * share)
            queue(gpu, *(ends if down else ends[::-1]), share, self._streams[gpu])
        for gpu in gpus:
            cuda.synchronize(gpu, self._streams[gpu])
        return time.perf_counter() - start
