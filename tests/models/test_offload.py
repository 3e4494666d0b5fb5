"""Models larger than the room for them: which weights go to the host, and that they answer as before.

On the CPU, with weights that are copied as on a GPU: memory "on the host" is then ordinary memory of its own, counted as it
is on a GPU.
"""

import gc as garbage
import pickle

import building
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import glake_infer as gi
from glake_infer.models import load as module
from glake_infer.models import offload, runner
from glake_infer.models.offload import BODY, REST, SMALL, TABLE, Candidate, pick, reads_of
from glake_infer.residency import Residency

KiB, MiB = 1 << 10, 1 << 20
SIDE = 512  # a float32 matrix of this side has 1 MiB


def graph():
    """A table of 8 MiB, a body with 3 MiB, matrices of 1, 1, 4 and 2 MiB, and small ones."""
    shapes = {
        "first": (SIDE, SIDE),
        "second": (SIDE, SIDE),
        "wide": (SIDE, 4 * SIDE),
        "narrow": (4 * SIDE, SIDE // 4),
    }
    weights = [
        building.tensor(building.matrix(n, shape), name) for n, (name, shape) in enumerate(shapes.items())
    ]
    table = building.tensor(building.matrix(9, (8 * SIDE, SIDE)), "table")
    inner = building.tensor(building.matrix(10, (SIDE, 3 * SIDE)), "inner")
    back = building.tensor(building.matrix(11, (3 * SIDE, SIDE)), "back")
    small = building.tensor(building.matrix(12, (SIDE, SIDE // 4)), "small")
    value = helper.make_tensor_value_info
    then = helper.make_graph(
        [
            helper.make_node("MatMul", ["h1", "inner"], ["t1"]),
            helper.make_node("MatMul", ["t1", "back"], ["t2"]),
        ],
        "then",
        [],
        [value("t2", TensorProto.FLOAT, ["n", SIDE])],
        [inner, back],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h1"], ["e"])],
        "else",
        [],
        [value("e", TensorProto.FLOAT, ["n", SIDE])],
    )
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["h0"]),
        helper.make_node("MatMul", ["h0", "first"], ["h1"]),
        helper.make_node("If", ["c"], ["h2"], then_branch=then, else_branch=other),
        helper.make_node("MatMul", ["h2", "second"], ["h3"]),
        helper.make_node("MatMul", ["h3", "wide"], ["h4"]),
        helper.make_node("MatMul", ["h4", "narrow"], ["y"]),
        helper.make_node("MatMul", ["h3", "small"], ["z"]),
    ]
    return building.model(
        nodes,
        [value("i", TensorProto.INT64, ["n"]), value("c", TensorProto.BOOL, [])],
        [building.floats("y", ("n", SIDE // 4)), building.floats("z", ("n", SIDE // 4))],
        [table, *weights, small],
    )


WHOLE = 8 + 3 + 3 + 1 + 1 + 4 + 1  # MiB, and 256 KiB
FEEDS = {"i": np.array([5, 4000, 17]), "c": np.array(True)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    store = gi.Store(folder / "store")
    building.save(graph(), folder / "m.onnx")
    gi.convert(folder / "m.onnx", folder / "m.glake", store=store)
    return folder, store


@pytest.fixture
def pool():
    with gi.Pool(device="cpu", limit="64MiB") as pool:
        yield pool
        garbage.collect()
        pool.check_invariants()


@pytest.fixture
def copied(monkeypatch):
    original, entry = Residency.__init__, ort.SessionOptions.add_session_config_entry

    def without_prepacking(options, key, value):  # private copies of matrices, which a GPU has none of
        entry(options, key, "1" if key == "session.disable_prepacking" else value)

    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", without_prepacking)
    monkeypatch.setattr(module, "maps_weights", lambda pool: False)
    monkeypatch.setattr(
        Residency, "__init__", lambda self, pool, copies, share=None: original(self, pool, True, share)
    )


def load(workshop, pool, **options):
    folder, store = workshop
    return gi.load(folder / "m.glake", pool, store=store, optimization="disable", **options)


def names_of(model):
    """The names of the weights that lie on the host."""
    weights = {w.digest: w.name for w in model.package.manifest.weights}
    return {weights[d] for d, far in model._residency.placed(weights).items() if far}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_how_a_graph_reads_its_weights():
    reads = reads_of(graph())
    assert {name: read.rank for name, read in reads.items()} == {
        "table": TABLE, "inner": BODY, "back": BODY, "first": REST, "second": REST, "wide": REST, "narrow": REST,
        "small": REST,
    }  # fmt: skip
    order = sorted(reads, key=lambda name: reads[name].last)
    assert order == ["table", "first", "inner", "back", "second", "wide", "narrow", "small"]


def test_a_table_that_something_else_reads_too_is_none():
    proto = building.model(
        [
            helper.make_node("Gather", ["tied", "i"], ["h"]),
            helper.make_node("Transpose", ["tied"], ["t"]),
            helper.make_node("MatMul", ["h", "t"], ["y"]),
            helper.make_node("Gather", ["columns", "i"], ["z"], axis=1),
            helper.make_node("Gather", ["given", "i"], ["w"]),
        ],
        [helper.make_tensor_value_info("i", TensorProto.INT64, ["n"])],
        [building.floats("y"), building.floats("z"), building.floats("w"), building.floats("given")],
        [
            building.tensor(building.matrix(n), name)
            for n, name in enumerate(["tied", "columns", "given", "unread"])
        ],
    )
    ranks = {name: read.rank for name, read in reads_of(proto).items()}
    assert ranks == {"tied": REST, "columns": REST, "given": REST, "unread": TABLE}


def test_fused_embeddings_are_tables():
    names = ["word", "position", "segment", "gamma", "beta"]
    node = helper.make_node(
        "EmbedLayerNormalization", ["ids", "", *names], ["y", "mask"], domain="com.microsoft"
    )
    weights = [building.tensor(building.matrix(n), name) for n, name in enumerate(names)]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT32, [1, "n"])
    proto = building.model([node], [ids], [building.floats("y")], weights, domains=["com.microsoft"])
    ranks = {name: read.rank for name, read in reads_of(proto).items()}
    assert ranks == {"word": TABLE, "position": TABLE, "segment": TABLE, "gamma": REST, "beta": REST}


CANDIDATES = [
    Candidate("t", 50, TABLE, 0), Candidate("b", 30, BODY, 5), Candidate("r1", 10, REST, 1), Candidate("r2", 40, REST, 2),
    Candidate("r3", 40, REST, 3), Candidate("r4", 20, REST, 4), Candidate("s", 1, SMALL, 6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, ""), (1, "t"), (50, "t"), (51, "t b"), (80, "t b"), (85, "t b r1"), (95, "t b r4"), (110, "t b r3"),
     (125, "t b r3 r1"), (150, "t b r3 r2"), (165, "t b r3 r2 r1"), (190, "t b r3 r2 r4 r1"), (191, "t b r3 r2 r4 r1 s"),
     (999, "t b r3 r2 r4 r1 s")],
)  # fmt: skip
def test_the_coldest_go_first_then_few_and_little_too_much(size, expected):
    assert [each.digest for each in pick(CANDIDATES, size)] == expected.split()
    assert [each.digest for each in pick(CANDIDATES[::-1], size)] == expected.split()


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (1, {"table"}),
        ("8MiB", {"table"}),
        ("9MiB", {"table", "back"}),
        ("12MiB", {"table", "back", "inner"}),
        ("15MiB", {"table", "back", "inner", "narrow"}),
        ("16MiB", {"table", "back", "inner", "wide"}),
        ("1TiB", {"table", "back", "inner", "wide", "narrow", "first", "second", "small"}),
    ],
)
def test_at_least_an_amount_goes_to_the_host_and_outputs_are_equal(workshop, pool, copied, amount, expected):
    with load(workshop, pool) as plain:
        answers = plain.run(FEEDS)
        assert plain.memory.offloaded == 0
        assert not plain.notes
        held = pool.stats().weights
    del plain
    garbage.collect()
    pool.trim()
    with load(workshop, pool, offload=amount) as model:
        assert names_of(model) == expected
        same(model.run(FEEDS), answers)
        offloaded, stats = model.memory.offloaded, pool.stats()
        assert offloaded <= stats.offloaded <= offloaded + len(expected) * 64 * KiB
        assert stats.weights == held - offloaded
        assert model.memory.own >= WHOLE * MiB
        model.suspend()
        assert pool.stats().offloaded == 0
        assert model.memory.offloaded == offloaded
        same(model.run(FEEDS), answers)
        (note,) = model.notes
        assert "stay in host memory" in note
        assert ("tables of which each run" in note) == (expected == {"table"})
    del model
    garbage.collect()
    assert pool.stats().offloaded == 0


def test_auto_keeps_all_on_the_device_where_it_fits(workshop, pool, copied):
    with load(workshop, pool, offload="auto", headroom="8MiB") as model:
        assert model.memory.offloaded == pool.stats().offloaded == 0
        assert not model.notes


@pytest.mark.parametrize("limit", [8, 11, 12, 14, 20, 24])
def test_auto_sends_just_enough(workshop, pool, copied, limit):
    with load(workshop, pool) as plain:
        answers = plain.run(FEEDS)
    del plain
    garbage.collect()
    pool.trim()
    pool.limit = limit * MiB
    pool._open().reset_peaks()
    headroom = 2 * MiB
    with load(workshop, pool, offload="auto", headroom=headroom) as model:
        same(model.run(FEEDS), answers)
        sizes = {w.digest: w.bytes for w in model.package.manifest.weights}
        chosen = [size for digest, size in sizes.items() if model._residency.placed([digest])[digest]]
        weights = sum(sizes.values()) - sum(chosen)
        room = limit * MiB - headroom
        assert weights <= room
        assert bool(chosen) == (sum(sizes.values()) > room)
        if chosen:  # with any one less it would not have fitted
            assert weights + min(chosen) > room - MiB
        assert pool.stats().peak_reserved <= limit * MiB


def test_a_limit_below_the_headroom_leaves_only_what_it_must(workshop, pool, copied):
    pool.limit = 6 * MiB
    with load(workshop, pool, offload="auto") as model:  # 256 MiB of headroom
        assert model.memory.offloaded == sum(w.bytes for w in model.package.manifest.weights)
        model.run(FEEDS)


def test_an_error_says_that_offload_would_do_if_it_would(workshop, pool, copied):
    pool.limit = 12 * MiB
    with pytest.raises(gi.OutOfMemoryError) as caught:
        load(workshop, pool, headroom="4MiB")
    assert "Or load it with offload='auto', which keeps 14.0 MiB of its weights in host memory" in str(
        caught.value
    )
    assert pickle.loads(pickle.dumps(caught.value)).hint == caught.value.hint != ""
    assert (pool.stats().active, pool.stats().offloaded) == (0, 0)
    with pytest.raises(gi.OutOfMemoryError) as caught:
        load(workshop, pool, headroom="13MiB")
    assert "offload" not in str(caught.value)
    with load(workshop, pool, offload="auto", headroom="4MiB") as model:
        model.run(FEEDS)
        assert model.memory.offloaded == 14 * MiB


def test_what_another_model_has_stays_where_it_is(workshop, pool, copied):
    near = load(workshop, pool)
    answers = near.run(FEEDS)
    far = load(workshop, pool, offload="12MiB")
    assert (near.memory.offloaded, far.memory.offloaded, pool.stats().offloaded) == (0, 0, 0)
    near.close()
    far.close()
    del near, far
    garbage.collect()
    far = load(workshop, pool, offload="12MiB")  # what was kept for later moves
    assert names_of(far) == {"table", "back", "inner"}
    near = load(workshop, pool)
    assert near.memory.offloaded == far.memory.offloaded == 14 * MiB
    more = load(workshop, pool, offload="14MiB")
    assert more.memory.offloaded == 14 * MiB
    for model in (far, near, more):
        same(model.run(FEEDS), answers)
        assert "stay in host memory" in model.notes[0]
        model.close()


def test_a_session_that_is_made_anew_keeps_the_choice(workshop, pool, copied):
    pool.limit = 16 * MiB
    model = load(workshop, pool, offload="auto", headroom="4MiB")
    answers, before = model.run(FEEDS), names_of(model)
    assert before
    model._convolutions = True
    model._spoil()
    pool.limit = 64 * MiB
    same(model.run(FEEDS), answers)
    assert names_of(model) == before
    model.close()


def test_models_of_a_runtime_make_room_before_anything_is_offloaded(workshop, copied):
    folder, store = workshop
    options = {"optimization": "disable", "headroom": "1MiB"}
    with gi.Runtime("30MiB", device="cpu", store=store) as runtime:
        other = building.matrix(77, (SIDE, 16 * SIDE))
        proto = building.model(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [building.floats("x", ("n", SIDE))],
            [building.floats("y", ("n", 16 * SIDE))],
            [building.tensor(other, "w")],
        )
        building.save(proto, folder / "other.onnx")
        gi.convert(folder / "other.onnx", folder / "other.glake", store=store)
        first = runtime.load(folder / "other.glake", **options)
        second = runtime.load(folder / "m.glake", offload="auto", **options)
        assert second.memory.offloaded == 0
        assert first.memory.asleep
        second.close()
        first.pinned = True
        first.resume()
        third = runtime.load(folder / "m.glake", offload="auto", **options)
        assert third.memory.offloaded == 11 * MiB  # 8 would leave a quarter of one too few
        third.run(FEEDS)
        assert not first.memory.asleep
        del first, second, third


def test_mapped_files_stay_mapped(workshop, pool):
    for amount in ("auto", "1GiB"):
        with load(workshop, pool, offload=amount) as model:
            assert model.memory.offloaded == 0
            assert "changes nothing on the CPU" in model.notes[-1]


@pytest.mark.parametrize("amount", ["all", "6 parsecs", -1, 1.5, None, True])
def test_a_wrong_amount_is_refused(workshop, pool, amount):
    with pytest.raises(gi.InputError, match=r"expected 'none', 'auto', or an amount of memory"):
        load(workshop, pool, offload=amount)
    assert load(workshop, pool, offload=0).notes == ()


def test_a_wrong_headroom_is_refused(workshop, pool):
    with pytest.raises(gi.InputError, match="not an amount of memory"):
        load(workshop, pool, offload="auto", headroom="much")


def test_the_headroom(workshop):
    assert offload.headroom_for(2 << 30) == 256 * MiB
    assert offload.headroom_for(100 << 30) == 5 << 30
    assert offload.headroom_for(100 << 30, "1GiB") == 1 << 30


def test_run_tells_what_lies_on_the_host_and_what_it_costs(workshop, copied, capsys):
    from glake_infer.cli.run import show

    folder, store = workshop
    report = runner.run([folder / "m.glake"], shapes=["i=3"], offload="16MiB", limit="64MiB", store=store)
    (model,) = report.models
    assert model.memory.offloaded == report.memory.offloaded == 18 * MiB
    assert model.memory.reading > 0
    memory = report.memory
    weights = memory.shared + memory.own + memory.private - memory.asleep - memory.offloaded
    assert weights + memory.activations + memory.idle == memory.reserved
    assert "each run reads 10.0 MiB of them over PCIe, about" in model.notes[-1]
    show(report)
    out = capsys.readouterr().out
    assert "On the host" in out
    assert "18.0 MiB" in out
