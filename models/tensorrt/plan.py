"""Plans in a package: cut into objects of the store, and put together again bit for bit.

What the plan holds of the model's weights (models/tensorrt/search.py) is no object of its own: a part names the
weight's. The rest of its section of weights is cut by content, at steps of 128 bytes, so that fine-tunes share what
TensorRT made of equal layers; leftovers below MINIMUM_CUT are one object. All before and behind that section, programs
mostly, is one object, compressed.
"""

from __future__ import annotations

import lzma
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from glake_infer.allocators.errors import DigestMismatchError, InputError, PackageError
from glake_infer.digest import PIECE, Buffer, digest_of, digest_of_file
from glake_infer.models.manifest import Engine, Part, Strand, Weight, Woven
from glake_infer.models.tensorrt.library import Kind
from glake_infer.models.tensorrt.search import STEP, Bytes, Needle, Place, Weave, find
from glake_infer.store import Store

if TYPE_CHECKING:
    from glake_infer.checking import File
    from glake_infer.models.package import Package
    from glake_infer.plan_bytes import Stretch

MINIMUM_CUT = 64 << 10
"""Smaller stretches that are in no weight are kept together, in one object of the engine."""

MAXIMUM_CUT = 4 << 20
CUT_MASK = np.uint64((1 << 11) - 1)
"""One of 2048 steps ends an object: 256 KiB on average."""

PRESET = 1
"""Of xz: a tenth of a second, and a hundredth of the size; more effort wins little."""

HEADER = 4096
"""Leading bytes of a plan in which its table of sections lies."""

_HASH = np.random.default_rng(7).integers(1, 1 << 63, STEP // 8, np.uint64) | np.uint64(1)
"""Fixed odd numbers: the sum of a step's words times these says whether an object ends there."""


@dataclass
class Split:
    """A plan in parts. Sizes in bytes."""

    parts: list[Part | Woven] = field(default_factory=list)
    objects: dict[str, int] = field(default_factory=dict)
    """What the plan needs of the store beside weights."""
    compressed: dict[str, int] = field(default_factory=dict)
    section: tuple[int, int] = (0, 0)
    """Offset and bytes of the section of weights; no bytes where it is not known."""
    found: int = 0
    """Bytes of the plan that are weights of the package."""
    new: int = 0
    """Bytes that were added to the store."""


def weights_section(plan: Buffer) -> tuple[int, int] | None:
    """(offset, bytes) of the plan's section of weights, as its table says; None where it has no such table."""
    view = memoryview(plan).cast("B")
    match = re.search(rb"THGW\0{4}(.{8})(.{8})", bytes(view[:HEADER]), re.DOTALL)
    if match is None:
        return None
    offset, size = (int.from_bytes(number, "little") for number in match.groups())
    return (offset, size) if HEADER // 64 <= offset <= offset + size <= len(view) else None


def split(plan: Buffer, weights: Iterable[Weight], store: Store) -> Split:
    """Cut a plan into parts, and put what is in no weight into the store; the caller holds `store.using()`.

    `weights`: whose objects the store has. Raises StorageFullError or StoreError; then at most complete objects, which
    the next gc removes, were added.
    """
    data = np.frombuffer(plan, np.uint8)
    made = Split(section=weights_section(plan) or (0, 0))
    begin, size = made.section if made.section[1] else (0, len(data))
    section = data[begin : begin + size]
    found = find(section, _needles(weights, store), (0,) if made.section[1] else (0, 1, 2, 3))
    gaps = list(_gaps(found, size))
    cuts = [
        (start, end, _cut(section[start:end], start)) for start, end in gaps if end - start >= MINIMUM_CUT
    ]
    leftovers = [(start, end) for start, end in gaps if end - start < MINIMUM_CUT]
    rest, woven = _rest(section, leftovers, found)
    outside = bytes(data[:begin]) + bytes(data[begin + size :])
    parts: list[Part | Woven] = []
    if outside:
        digest = _add(made, store, lzma.compress(outside, preset=PRESET))
        made.compressed[digest] = len(outside)
        parts += _pieces(digest, [(0, begin, 0), (begin + size, len(data), begin)])
    for start, _, ends in cuts:
        position = start
        for end in ends:
            digest = _add(made, store, section[position:end].tobytes())
            parts.append(Part(offset=begin + position, bytes=end - position, digest=digest))
            position = end
    if len(rest):
        digest = _add(made, store, rest)
        position = 0
        for start, end in leftovers:
            parts += _pieces(digest, [(begin + start, begin + end, position)])
            position += end - start
    else:
        digest = ""
    for place in found:
        if isinstance(place, Place):
            made.found += place.needle.size
            parts.append(
                Part(offset=begin + place.offset, bytes=place.needle.size, digest=place.needle.digest)
            )
            continue
        strands = []
        for number, (needle, width) in enumerate(place.strands):
            start = woven[place.offset, number] if needle is None else 0
            strands.append(Strand(digest=needle.digest if needle else digest, bytes=width, start=start))
            made.found += place.rows * width if needle else 0
        parts.append(
            Woven(offset=begin + place.offset, bytes=place.rows * place.pitch, strands=tuple(strands))
        )
    made.parts = sorted(parts, key=lambda part: part.offset)
    return made


def _needles(weights: Iterable[Weight], store: Store) -> list[Needle]:
    """Every distinct weight once, its bytes mapped from the store."""
    distinct = {weight.digest: weight for weight in weights if weight.bytes >= STEP}
    return [
        Needle(
            digest,
            np.memmap(store.objects.path(digest), np.uint8, "r", shape=(weight.bytes,)),
            weight.shape[0] if weight.shape else 1,
        )
        for digest, weight in distinct.items()
    ]


def _gaps(found: list[Place | Weave], size: int) -> Iterator[tuple[int, int]]:
    position = 0
    for place in found:
        length = place.needle.size if isinstance(place, Place) else place.rows * place.pitch
        if place.offset > position:
            yield position, place.offset
        position = place.offset + length
    if position < size:
        yield position, size


def _cut(data: Bytes, start: int) -> list[int]:
    """Ends of the objects that `data` becomes, counted from `start` before it: cut where a step says so."""
    lead = -start % STEP
    steps = (len(data) - lead) // STEP
    ends, last = [], 0
    marks: list[int] = []
    for first in range(0, steps, PIECE // STEP):
        part = data[lead + first * STEP : lead + min(first + PIECE // STEP, steps) * STEP]
        words = np.ascontiguousarray(part).view(np.uint64).reshape(-1, STEP // 8)
        sums = (words * _HASH).sum(axis=1, dtype=np.uint64)
        sums ^= sums >> np.uint64(29)
        hits = np.flatnonzero((sums & CUT_MASK) == 0)
        marks += (lead + (hits + first + 1) * STEP).tolist()
    for mark in [*marks, len(data)]:
        while mark - last > MAXIMUM_CUT:
            last += MAXIMUM_CUT
            ends.append(last)
        if mark - last >= MINIMUM_CUT or (mark == len(data) and mark > last):
            last = mark
            ends.append(last)
    return [start + end for end in ends]


def _rest(
    section: Bytes, leftovers: list[tuple[int, int]], found: list[Place | Weave]
) -> tuple[bytes, dict[tuple[int, int], int]]:
    """The bytes of the object of leftovers, and where in it the strands of weaves lie that are of no weight."""
    pieces = [section[start:end].tobytes() for start, end in leftovers]
    position = sum(len(piece) for piece in pieces)
    strands: dict[tuple[int, int], int] = {}
    for weave in found:
        if not isinstance(weave, Weave):
            continue
        rows = section[weave.offset : weave.offset + weave.rows * weave.pitch].reshape(
            weave.rows, weave.pitch
        )
        column = 0
        for number, (needle, width) in enumerate(weave.strands):
            if needle is None:
                strands[weave.offset, number] = position
                pieces.append(np.ascontiguousarray(rows[:, column : column + width]).tobytes())
                position += len(pieces[-1])
            column += width
    return b"".join(pieces), strands


def _pieces(digest: str, ranges: Iterable[tuple[int, int, int]]) -> list[Part]:
    return [
        Part(offset=start, bytes=end - start, digest=digest, start=place)
        for start, end, place in ranges
        if end > start
    ]


def _add(made: Split, store: Store, data: bytes) -> str:
    digest, new = store.objects.add_buffer(data)
    made.objects[digest] = len(data)
    made.new += len(data) if new else 0
    return digest


class Plan:
    """The plan of a package's engine, read out of the store. Cheap to make; nothing is read before it is asked for.

    Thread-safe. Reading raises PackageError (an object is missing or short) or DigestMismatchError (altered), which
    name it, and what to do.
    """

    def __init__(self, package: Package, kind: Kind) -> None:
        """Raises InputError where the package has no engine of this kind."""
        engines = package.manifest.engines
        if kind not in engines:
            others = ", ".join(engines) or "none"
            raise InputError(
                f"{package.path} has no {kind} engine (it has {others}). Convert its model again with "
                f"`--engine {kind}`."
            )
        self.package = package
        self.entry: Engine = engines[kind]
        self._unpacked: dict[str, bytes] = {}

    def files(self) -> dict[str, File]:
        """Every object that it is made of, by digest."""
        from glake_infer.checking import File

        store, sizes = self.package.store, self.package.manifest.distinct
        return {d: File(store.objects.path(d), d, sizes[d], store.root) for d in sorted(self.entry.needed)}

    def to_bytes(self) -> bytes:
        """The whole plan, its digest checked."""
        data = self.read(0, self.entry.bytes)
        if digest_of(data) != self.entry.digest:
            for digest in sorted(self.entry.needed):
                if digest_of_file(self.package.store.objects.path(digest)) != digest:
                    raise self.package.damaged(digest)
            raise DigestMismatchError(
                f"the {self.entry.kind} engine of {self.package.path} is not the one that was written, though each of "
                f"its parts is whole: its manifest was altered. Convert {self.package.manifest.source.name} again."
            )
        return data

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the plan, fewer at its end; they are not checked (`to_bytes` and `Package.verify` are)."""
        end = min(offset + size, self.entry.bytes)
        if not 0 <= offset < end:
            return b""
        buffer = bytearray(end - offset)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the plan from `offset` on, all of which must be there."""
        end = offset + len(buffer)
        open_files: dict[str, int] = {}
        try:
            for part in self.entry.parts:
                first, last = max(part.offset, offset), min(part.offset + part.bytes, end)
                if first >= last:
                    continue
                target = buffer[first - offset : last - offset]
                if isinstance(part, Part):
                    self._copy(part.digest, part.start + first - part.offset, target, open_files)
                else:
                    self._copy_woven(part, first - part.offset, target, open_files)
        finally:
            for fd in open_files.values():
                os.close(fd)

    def stretches(self) -> list[Stretch]:
        """The plan as consecutive bytes of files, in order; what is compressed in the store is left out.

        Woven bytes are one stretch of rows for each strand.
        """
        from glake_infer.plan_bytes import Stretch

        files = self.files()
        made: list[Stretch] = []
        for part in self.entry.parts:
            if isinstance(part, Part):
                if part.digest not in self.entry.compressed:
                    made.append(Stretch(part.offset, part.bytes, files[part.digest], part.start))
                continue
            position = part.offset
            for strand in part.strands:
                file = files[strand.digest]
                made.append(Stretch(position, strand.bytes, file, strand.start, part.rows, part.width))
                position += strand.bytes
        return made

    def _copy_woven(self, part: Woven, skip: int, target: memoryview, open_files: dict[str, int]) -> None:
        """Fill `target` with woven bytes from `skip` bytes into the part on."""
        first, last = skip // part.width, -(-(skip + len(target)) // part.width)
        rows = np.empty((last - first, part.width), np.uint8)
        column = 0
        for strand in part.strands:
            piece = bytearray((last - first) * strand.bytes)
            self._copy(strand.digest, strand.start + first * strand.bytes, memoryview(piece), open_files)
            rows[:, column : column + strand.bytes] = np.frombuffer(piece, np.uint8).reshape(-1, strand.bytes)
            column += strand.bytes
        begin = skip - first * part.width
        target[:] = rows.reshape(-1)[begin : begin + len(target)].data

    def _copy(self, digest: str, start: int, target: memoryview, open_files: dict[str, int]) -> None:
        if digest in self.entry.compressed:
            target[:] = self._unpack(digest)[start : start + len(target)]
            return
        try:
            if digest not in open_files:
                open_files[digest] = os.open(
                    self.package.store.objects.path(digest), os.O_RDONLY | os.O_CLOEXEC
                )
            done = 0
            while done < len(target):
                count = os.preadv(open_files[digest], [target[done:]], start + done)
                if not count:
                    raise self._unusable(digest, "short")
                done += count
        except OSError as error:
            raise self._unusable(digest, str(error.strerror)) from error

    def _unpack(self, digest: str) -> bytes:
        if digest not in self._unpacked:
            try:
                packed = self.package.store.objects.path(digest).read_bytes()
                data = lzma.LZMADecompressor().decompress(
                    packed, max_length=self.entry.compressed[digest] + 1
                )
            except OSError as error:
                raise self._unusable(digest, str(error.strerror)) from error
            except (lzma.LZMAError, EOFError) as error:
                raise self.package.damaged(digest) from error
            if len(data) != self.entry.compressed[digest]:
                raise self.package.damaged(digest)
            self._unpacked[digest] = data
        return self._unpacked[digest]

    def _unusable(self, digest: str, why: str) -> PackageError:
        return self.package.unusable(digest, why)
