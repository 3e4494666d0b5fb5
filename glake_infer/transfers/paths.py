"""Which links GPUs have, and what they reach: measured once, and kept in `links.json` of the cache folder.

Figures are of one driver version and of GPUs by their UUIDs, so another machine, GPU or driver is measured anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glake_infer import cuda
from glake_infer.allocators.errors import DriverError
from glake_infer.transfers.ending import end_transfers
from glake_infer.transfers.settings import SLOT

if TYPE_CHECKING:
    from glake_infer.allocators import _native

SHORT = 128 << 20
"""Bytes of a copy of the calibration: 2.4 ms over one PCIe 5 link."""

STAGING = 96 << 20
"""Bytes of a peer's memory: three buffers of 16 MiB for each direction, so that both hops overlap."""

Rates = tuple[float, float]
"""Bytes per second to the device, and to the host."""


@dataclass(frozen=True)
class PathFigures:
    """What a GPU's own link reaches, one by a peer, and both together."""

    own: Rates
    by_peer: Rates
    together: Rates

    @property
    def gain(self) -> float:
        """Both together, of its own alone; the worse direction."""
        return min(both / one if one else 0.0 for both, one in zip(self.together, self.own, strict=True))


@dataclass(frozen=True)
class LinkReport:
    """One path to one GPU."""

    device: str
    via: str
    """The device whose PCIe link it is: the same one for its own."""
    name: str
    pci: str
    speed: str
    """Of the PCIe link as the system shows it, as "32.0 GT/s x16"; empty where it does not."""
    numa: int | None
    peer_access: bool
    to_device: float
    """Bytes per second; 0 where nothing was measured."""
    to_host: float
    together_to_device: float
    """With the GPU's own link and those of all peers in rows before."""
    together_to_host: float


def gpu_count() -> int:
    """How many GPUs this process sees; 0 without a driver."""
    from glake_infer.allocators import _native

    try:
        return _native.cuda_device_count()
    except DriverError:
        return 0


def figures_file() -> Path:
    """Where figures are kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "glake-infer" / "links.json"


def figures(index: int, peer: int, staging: int, size: int) -> PathFigures:
    """The figures of a GPU and one peer: kept ones, else measured now (0.1 s) with a buffer of the peer's memory."""
    key = f"{_driver()} {cuda.uuid(index)} by {cuda.uuid(peer)}"
    kept = _read()
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found = kept[key]
        rates = [(float(a), float(b)) for a, b in (found[n] for n in ("own", "by_peer", "together"))]
        if all(0 < rate < math.inf for pair in rates for rate in pair):
            return PathFigures(*rates)
    own = measure(index, [None], 0, SHORT)
    relay = measure(index, [(peer, staging, size)], 0, SHORT)
    both = measure(index, [None, (peer, staging, size)], 0, SHORT)
    made = PathFigures(own, relay, both)
    _write(key, {**asdict(made), "measured": time.strftime("%Y-%m-%d")})
    return made


def engine_over(index: int, links: Sequence[tuple[int, int, int] | None]) -> _native.TransferEngine:
    """A new engine whose paths to a GPU are these links, as for `measure`. Raises DriverError."""
    from glake_infer.allocators import _native

    engine = _native.TransferEngine.on_cuda(index, 1, SLOT, SLOT, 0)
    for link in links:
        if link is None:
            engine.add_cuda_path(index)
        else:
            engine.add_cuda_relay(index, *link)
    return engine


def measure(
    index: int,
    links: Sequence[tuple[int, int, int] | None],
    repeats: int,
    size: int,
) -> Rates:
    """Bytes per second in each direction over these links of a GPU at once, from and to page-locked memory.

    A link: None for its own, or (peer, address of a buffer there, its bytes). The best of `repeats` copies more than two.
    """
    engine = engine_over(index, links)
    with _memory(engine, index, size) as (host, device):
        found = []
        for down in (True, False):
            best = 0.0
            for _ in range(2 + repeats):
                start = time.perf_counter()
                transfer = engine.copy(index, down, [(host, device, size)], 0, len(links))
                try:
                    while not transfer.wait(1):
                        pass
                except BaseException:  # Ctrl-C
                    end_transfers([transfer])
                    raise
                best = max(best, size / (time.perf_counter() - start))
                view = transfer.view()
                if view["link_error"] or view["lost_links"]:
                    raise DriverError(view["link_error"] or view["lost_links"][0])
            found.append(best)
    return found[0], found[1]


@contextlib.contextmanager
def _memory(engine: _native.TransferEngine, index: int, size: int) -> Iterator[tuple[int, int]]:
    from glake_infer.allocators import _native

    pool = _native.device_pool(f"cuda:{index}")
    device = pool.allocate(size, "workspace", -1)
    try:
        host, _ = engine.take_buffer(size)
        try:
            yield host, device
        finally:
            engine.give_buffer(host)
    finally:
        pool.deallocate(device)


def survey(
    *,
    size: int = 1 << 30,
    repeats: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LinkReport]:
    """Measure all paths of all GPUs that this process sees, each alone and together with those before it.

    Opens every GPU, and takes `size` bytes of each and of the host in turn. Raises DriverError, OutOfMemoryError.
    """
    from glake_infer.allocators import _native

    count, found = gpu_count(), list[LinkReport]()
    for index in range(count):
        links: list[tuple[int, int, int] | None] = []
        staged: list[tuple[_native.Pool, int]] = []
        try:
            for via in [index, *(peer for peer in range(count) if peer != index)]:
                if progress:
                    progress("paths", len(found), count * count)
                access = via == index or _native.cuda_peers(index, via)
                alone = together = (0.0, 0.0)
                if access:
                    link = None
                    if via != index:
                        pool = _native.device_pool(f"cuda:{via}")
                        address = pool.allocate(STAGING, "workspace", -1)
                        staged.append((pool, address))
                        link = (via, address, STAGING)
                    links.append(link)
                    alone = measure(index, [link], repeats, size)
                    together = measure(index, links, repeats, size) if len(links) > 1 else alone
                named = (f"cuda:{index}", f"cuda:{via}", _native.cuda_device_name(via))
                found.append(LinkReport(*named, *_pci(via), access, *alone, *together))
        finally:
            for pool, address in staged:
                pool.deallocate(address)
    return found


def _pci(index: int) -> tuple[str, str, int | None]:
    """Address, speed and NUMA node of a GPU's PCIe link, as the system shows them."""
    address = cuda.pci_address(index)
    folder = Path("/sys/bus/pci/devices") / address.lower()

    def read(name: str) -> str:
        try:
            return (folder / name).read_text().strip()
        except OSError:
            return ""

    speed, width, node = read("max_link_speed"), read("max_link_width"), read("numa_node")
    text = f"{speed.removesuffix(' PCIe')} x{width}" if speed and width else ""
    return address, text, int(node) if node.isdigit() else None


def _driver() -> int:
    from glake_infer.allocators import _native

    return _native.cuda_driver_version()


def _read() -> dict[str, Any]:
    try:
        kept = json.loads(figures_file().read_text())
    except (OSError, ValueError):  # none yet, or somebody else's idea of one: measured anew
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(key: str, value: dict[str, Any]) -> None:
    """Several processes may do so at once: the last one's file stays. Where nothing can be kept it is measured again."""
    target = figures_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            try:
                json.dump({**_read(), key: value}, file, indent=1)
                file.flush()
                os.replace(file.name, target)  # noqa: PTH105
            except BaseException:
                os.unlink(file.name)  # noqa: PTH108
                raise
    except OSError:
        pass
