"""Plans cut into objects and put together again, on made-up plans: no TensorRT is needed."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

import glake_infer as gi
from glake_infer import maintenance
from glake_infer.allocators.errors import DigestMismatchError, InputError, PackageError
from glake_infer.digest import digest_of
from glake_infer.models.manifest import Engine, Manifest, Part, Source, Variant, Weight, Woven, run_digest
from glake_infer.models.manifest import Run as ManifestRun
from glake_infer.models.package import Package, write_package
from glake_infer.models.tensorrt import plan as module
from glake_infer.models.tensorrt.plan import Plan, split, weights_section

rng = np.random.default_rng(5)


def random(*shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def made_up(section, header=3000, trailer=b"\0\0\0\0"):
    """A plan as TensorRT-RTX writes them: a table of sections, programs, weights."""
    head = bytearray(os.urandom(header // 2).hex().encode().ljust(header, b"p"))
    table = b"THGW\0\0\0\0" + header.to_bytes(8, "little") + len(section).to_bytes(8, "little")
    head[88 : 88 + len(table)] = table
    return bytes(head) + section + trailer


class Shelf:
    """A store with weights in it, and packages of plans."""

    def __init__(self, folder):
        self.folder = folder
        self.store = gi.Store(folder / "store")
        self.weights = []

    def add(self, array):
        data = np.ascontiguousarray(array).tobytes()
        digest, _ = self.store.objects.add_buffer(data)
        self.weights.append(
            Weight(
                name=f"w{len(self.weights)}", digest=digest, bytes=len(data), dtype="float", shape=array.shape
            )
        )
        return array

    def engine(self, plan, found):
        return Engine(
            kind="tensorrt-rtx", version="1", capabilities=("8.6",), bytes=len(plan), digest=digest_of(plan),
            parts=tuple(found.parts), objects=found.objects, compressed=found.compressed, inputs=(), outputs=(),
            weights_offset=found.section[0], weights_bytes=found.section[1],
        )  # fmt: skip

    def package(self, plan, found, name="p.glake"):
        weights = tuple(self.weights)
        size = sum(w.bytes for w in weights)
        run = {"first": 0, "count": len(weights), "bytes": size, "digest": run_digest(weights)}
        graph = b"no graph"
        manifest = Manifest(
            producer="test", source=Source(name="m.onnx", digest=digest_of(b"m")), inputs=(), outputs=(),
            variants={"onnx": Variant(graph="graph.onnx", digest=digest_of(graph), purpose="p")},
            weights=weights, runs=(ManifestRun(**run),) if weights else (),
            engines={"tensorrt-rtx": self.engine(plan, found)},
        )  # fmt: skip
        with self.store.using():
            write_package(self.store, self.folder / name, manifest, {"graph.onnx": graph})
        return Package(self.folder / name, self.store)

    def check(self, plan, phases=None):
        """Split a plan, and see that it comes back; returns the split."""
        found = split(plan, self.weights, self.store)
        package = self.package(plan, found)
        assert Plan(package, "tensorrt-rtx").to_bytes() == plan
        return found


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path)


def test_whole_weights_are_the_store_s_own(shelf):
    a, b = shelf.add(random(64, 64)), shelf.add(random(300, dtype=np.float16))
    section = a.tobytes() + bytes(128) + b.tobytes().ljust(640, b"\0") + a.tobytes()
    plan = made_up(section)
    found = shelf.check(plan)
    assert found.section == (3000, len(section)) == weights_section(plan)
    assert found.found == 2 * a.nbytes + b.nbytes
    digests = [w.digest for w in shelf.weights]
    assert [p.offset for p in found.parts if p.digest in digests] == [
        3000,
        3000 + 16384 + 128,
        3000 + 16384 + 768,
    ]
    assert sum(found.compressed.values()) == 3000 + 4
    rest = found.objects.keys() - found.compressed.keys()
    assert [found.objects[digest] for digest in rest] == [128 + 40]
    again = split(plan, shelf.weights, shelf.store)
    assert (again.new, again.parts) == (0, found.parts)


@pytest.mark.parametrize("phase", [4, 36, 124])
def test_weights_at_any_multiple_of_four(shelf, phase):
    a = shelf.add(random(64, 64))
    found = shelf.check(made_up(bytes(phase) + a.tobytes() + bytes(60)))
    assert found.found == a.nbytes


@pytest.mark.parametrize("lead", range(1, 8))
def test_a_plan_without_a_table_is_searched_as_a_whole(shelf, lead):
    a, q, k = shelf.add(random(64, 64)), shelf.add(random(32, 48)), shelf.add(random(32, 16))
    plan = b"x" * lead + a.tobytes() + np.concatenate([q, k], 1).tobytes() + b"end"
    assert weights_section(plan) is None
    found = shelf.check(plan)
    assert found.section == (0, 0)
    assert found.found == a.nbytes + q.nbytes + k.nbytes
    assert not found.compressed


def test_a_table_that_lies_is_not_believed():
    plan = made_up(bytes(1000))
    assert weights_section(plan) == (3000, 1000)
    for offset, size in ((3000, 5000), (10**9, 8), (0, 10), (2**63, 2**63)):
        table = offset.to_bytes(8, "little") + size.to_bytes(8, "little")
        assert weights_section(plan[:96] + table + plan[112:]) is None


def test_matrices_side_by_side_are_woven(shelf):
    q, k, v = (shelf.add(random(96, 64)) for _ in range(3))
    section = np.concatenate([v, k, q], 1).tobytes()
    found = shelf.check(made_up(section))
    assert found.found == len(section)
    (woven,) = (part for part in found.parts if isinstance(part, Woven))
    assert [s.digest for s in woven.strands] == [w.digest for w in reversed(shelf.weights)]
    assert (woven.rows, woven.width) == (96, 768)


def test_what_is_woven_with_other_bytes(shelf):
    """A row has bytes of no weight: before, between and behind; the last row ends with the section."""
    q, k = shelf.add(random(64, 64)), shelf.add(random(64, 32))
    f = [random(64, 4), random(64, 8), random(64, 12)]
    section = np.concatenate([q, f[0], k, f[1]], 1).tobytes()
    found = shelf.check(made_up(section))
    assert found.found == q.nbytes + k.nbytes
    section = np.concatenate([f[2], k, f[1], q, f[0]], 1).tobytes()
    assert shelf.check(made_up(section)).found == q.nbytes + k.nbytes


def test_rows_that_are_equal_only_in_part_are_no_match(shelf):
    q, k = shelf.add(random(64, 64)), shelf.add(random(64, 64))
    both = np.concatenate([q, k], 1)
    both[40, 70] += 1  # in the middle of k
    assert shelf.check(made_up(both.tobytes())).found == q.nbytes
    changed = q.copy()
    changed[63, 63] += 1
    assert shelf.check(made_up(changed.tobytes())).found == 0


def test_weights_that_say_nothing_are_not_looked_for(shelf):
    """Zeros and ones are everywhere: no place is theirs, and looking for them takes no time."""
    zeros, ones = shelf.add(np.zeros((64, 64), np.float32)), shelf.add(np.ones(512, np.float32))
    a = shelf.add(random(64, 64))
    found = shelf.check(made_up(bytes(1 << 20) + ones.tobytes() * 8 + a.tobytes() + zeros.tobytes()))
    assert found.found == a.nbytes
    assert sum(found.objects.values()) < 300 << 10  # equal pieces of zeros are one object


def test_a_weight_within_another_does_not_overlap(shelf):
    big = shelf.add(random(128, 64))
    shelf.add(big[32:64])
    found = shelf.check(made_up(big.tobytes()))
    assert found.found == big.nbytes


def test_what_no_weight_holds_is_shared_where_it_is_equal(shelf):
    """Folded convolutions of two fine-tunes: equal but for one place, and moved by a head of another size."""
    made = os.urandom(8 << 20)
    other = made[: 3 << 20] + os.urandom(512) + made[(3 << 20) + 512 :]
    first = shelf.check(made_up(made))
    second = split(made_up(os.urandom(70 << 10)[: 70 * 1024] + other), shelf.weights, shelf.store)
    assert first.new >= 8 << 20
    assert 0 < second.new < (4 << 20) + (140 << 10)
    sizes = [p.bytes for p in first.parts if p.digest not in first.compressed]
    assert max(sizes) <= module.MAXIMUM_CUT
    assert min(sizes[:-1]) >= module.MINIMUM_CUT
    assert len(sizes) > 8


def test_reading_anywhere(shelf):
    q, k, a = shelf.add(random(64, 64)), shelf.add(random(64, 32)), shelf.add(random(100))
    section = os.urandom(100) + np.concatenate([k, q], 1).tobytes() + os.urandom(40) + a.tobytes()
    plan = made_up(section)
    reader = Plan(shelf.package(plan, split(plan, shelf.weights, shelf.store)), "tensorrt-rtx")
    for offset, size in [
        (0, 64),
        (64, 48),
        (2999, 2),
        (3099, 1),
        (3100, 384),
        (3333, 1000),
        (0, 10**9),
        (len(plan), 5),
    ]:
        assert reader.read(offset, size) == plan[offset : offset + size]
    for _ in range(200):
        offset, size = int(rng.integers(0, len(plan))), int(rng.integers(0, 9000))
        assert reader.read(offset, size) == plan[offset : offset + size]


def test_a_package_without_an_engine_says_what_to_do(shelf):
    shelf.add(random(64, 64))
    plan = made_up(os.urandom(5000))
    package = shelf.package(plan, split(plan, shelf.weights, shelf.store))
    with pytest.raises(InputError, match=r"no tensorrt engine \(it has tensorrt-rtx\).*--engine tensorrt`"):
        Plan(package, "tensorrt")


@pytest.fixture
def stored(shelf):
    """(package, split) of a plan with a weight and parts of each form."""
    q, k = shelf.add(random(64, 64)), shelf.add(random(64, 32))
    plan = made_up(np.concatenate([k, q], 1).tobytes() + os.urandom(300 << 10) + os.urandom(50))
    found = split(plan, shelf.weights, shelf.store)
    return shelf.package(plan, found), found


def damage(package, digest, change):
    path = package.store.objects.path(digest)
    data = bytearray(path.read_bytes())
    status = path.stat()
    path.unlink()
    if (made := change(data)) is not None:
        path.write_bytes(made)
        os.utime(path, (status.st_mtime, status.st_mtime))


def flip(data):
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize("which", ["weight", "compressed", "own"])
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda data: None, PackageError, "(missing|No such file).*should hold"),
        (lambda data: data[: len(data) // 2], (PackageError, DigestMismatchError), "short|changed on disk"),
        (flip, DigestMismatchError, "was changed on disk.*store verify --remove"),
    ],
    ids=["missing", "truncated", "altered"],
)
def test_a_damaged_part_is_named(stored, which, change, error, said):
    package, _ = stored
    engine = package.manifest.engines["tensorrt-rtx"]
    own = max(engine.objects.keys() - engine.compressed.keys(), key=engine.objects.__getitem__)
    digest = {
        "weight": package.manifest.weights[0].digest, "compressed": next(iter(engine.compressed)), "own": own,
    }[which]  # fmt: skip
    damage(package, digest, change)
    with pytest.raises(error, match=said) as caught:
        Plan(package, "tensorrt-rtx").to_bytes()
    assert digest in str(caught.value)
    assert ("the weight 'w0'" if which == "weight" else "a part of the tensorrt-rtx engine") in str(
        caught.value
    )
    report = maintenance.verify(package.store)
    assert {**report.damaged, **report.missing} == {digest: [str(package.path)]}
    if change is not flip:  # which only reading finds
        with pytest.raises((PackageError, DigestMismatchError), match=digest):
            package.check_present()


def test_a_manifest_that_was_altered_and_sealed_anew_is_found(stored):
    package, _ = stored
    engine = package.manifest.engines["tensorrt-rtx"]
    parts = [*engine.parts]
    index = next(i for i, p in enumerate(parts) if isinstance(p, Part) and p.bytes >= 2 and p.start)
    parts[index] = parts[index].model_copy(update={"start": parts[index].start - 1})
    lying = SimpleNamespace(
        manifest=package.manifest.model_copy(
            update={"engines": {"tensorrt-rtx": engine.model_copy(update={"parts": tuple(parts)})}}
        ),
        store=package.store, path=package.path, damaged=package.damaged,
    )  # fmt: skip
    with pytest.raises(DigestMismatchError, match=r"each of its parts is whole.*Convert m\.onnx again"):
        Plan(lying, "tensorrt-rtx").to_bytes()


def test_an_archive_bomb_is_not_unpacked(stored):
    """A compressed object that unpacks to more than the manifest says."""
    package, _ = stored
    engine = package.manifest.engines["tensorrt-rtx"]
    (digest,) = engine.compressed
    lying = engine.model_copy(update={"compressed": {digest: 100}})
    reader = Plan(package, "tensorrt-rtx")
    reader.entry = lying
    with pytest.raises(DigestMismatchError):
        reader.read(0, 10)
