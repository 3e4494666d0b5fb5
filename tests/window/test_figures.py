"""The sums that all views show."""

import random

import pytest
import scenes
from scenes import GiB, MiB

from glake_infer.window import figures


@pytest.mark.parametrize("status", [scenes.crowd(), scenes.crowd(5, 30, seed=3), scenes.lonely()])
def test_a_device_is_split_without_rest(status):
    for device in status.devices:
        kinds = figures.split(device)
        assert list(kinds) == list(figures.KINDS)
        assert all(size >= 0 for size in kinds.values())
        assert sum(kinds.values()) == device.limit
        assert device.limit - kinds["free"] == device.used
        for process in device.processes:
            assert sum(figures.private_of(process).values()) == process.pool.reserved - process.pool.shared


def test_who_is_outside_of_the_broker_counts_apart():
    outside = scenes.process(2, "outside", connected=False, shared=0)
    device = scenes.device([scenes.process(1)])
    device = device.model_copy(update={"processes": [*device.processes, outside]})
    kinds = figures.split(device)
    assert kinds["outside"] == outside.pool.reserved == 300 * MiB
    assert device.limit - kinds["free"] == device.used + 300 * MiB


def test_more_than_the_limit_leaves_nothing_free():
    device = scenes.device([scenes.process(n) for n in range(20)], limit=GiB)
    assert figures.split(device)["free"] == 0


def test_odd_figures_split_too():
    """Those of a moment in which a pool changed, and of processes that do not answer."""
    rng = random.Random(0)
    for _ in range(500):
        names = ("reserved", "active", "idle", "weights", "shared", "unused_weights")
        odd = {name: rng.choice((0, rng.randrange(GiB))) for name in names}
        process = scenes.process()
        process = process.model_copy(update={"pool": process.pool.model_copy(update=odd)})
        for device in (scenes.device([process]), figures.ungoverned("cpu", "", 24 * GiB, [process])):
            assert all(size >= 0 for size in figures.split(device).values())


def test_saving_against_counting_by_hand():
    status = scenes.crowd(6, 50, seed=1)
    (device,) = status.devices
    there = separate = models = 0
    for chunk in device.chunks:
        if chunk.state == "ready" and chunk.processes:
            there += chunk.size
            separate += chunk.size * len(chunk.processes)
            users = sum(chunk.token in m.chunks for p in device.processes for m in p.models)
            models += chunk.size * max(users, len(chunk.processes))
    saving = figures.saving(device)
    assert (saving.there, saving.by_process, saving.by_model) == (there, separate, models)
    assert saving.processes == separate - there > 0
    assert saving.models == models - there > 0
    assert there == device.weights - device.unused - sum(
        c.size for c in device.chunks if c.state == "loading"
    )


def test_a_matrix_counts_each_chunk_once_for_each_pair():
    sizes = {"a": 1, "b": 10, "c": 100, "gone": 1000}
    made = figures.matrix(
        [("x", ["a", "b", "b"]), ("y", ["b", "c", "unknown"]), ("z", []), ("x", ["a", "b", "c"])], sizes
    )
    assert made.names == ("x", "y", "z", "x")
    assert made.cells == ((11, 10, 0, 11), (10, 110, 0, 110), (0, 0, 0, 0), (11, 110, 0, 111))
    assert made.left_out == 0
    small = figures.matrix([(str(n), ["a"] * n) for n in range(3)], sizes, most=1)
    assert (small.names, small.cells, small.left_out) == (("1",), ((1,),), 2)


def test_the_largest_weights_and_who_has_all_of_them():
    rng = random.Random(2)
    whole, parted = scenes.digest(rng), scenes.digest(rng)
    weight = scenes.WeightStatus

    def chunk(token, processes, weights):
        return scenes.ChunkStatus(
            token=token, region="r", size=8 * MiB, used=8 * MiB, state="ready", processes=processes,
            idle_seconds=0, weights=weights,
        )  # fmt: skip

    device = scenes.device(
        [scenes.process(1, models=[scenes.model(chunks=["c1", "c2"])]), scenes.process(2), scenes.process(3)],
        [
            chunk(
                "c1",
                [1, 2],
                [weight(digest=whole, offset=0, size=3), weight(digest=parted, offset=3, size=5)],
            ),
            chunk("c2", [2, 1, 3], [weight(digest=parted, offset=0, size=4)]),
        ],
    )
    first, second = figures.largest_weights(device)
    assert (first.digest, first.bytes, first.processes, first.models) == (parted, 9, (1, 2), 1)
    assert sorted(first.chunks) == ["c1", "c2"]
    assert (second.digest, second.bytes, second.processes) == (whole, 3, (1, 2))
    assert len(figures.largest_weights(device, most=1)) == 1
    assert figures.count_weights(device) == 2


def test_models_of_one_name_are_told_apart():
    models = [scenes.model(name) for name in ("a", "a", "a#2", "b", "a")]
    names = [name for name, _ in figures.labelled_models(scenes.process(models=models))]
    assert len(set(names)) == 5
    assert names[0] == "a"
    assert names[3] == "b"
