"""Which sessions are built while their weights are on their way, and that nothing is left where building one fails."""

import gc

import building
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

import glake_infer as gi
from glake_infer.holding import Holding
from glake_infer.models import load as module
from glake_infer.models.overlap import weights_may_come_later
from glake_infer.residency import Residency

CUDA = "CUDAExecutionProvider"
PLAIN = [(CUDA, {"device_id": "0"}), "CPUExecutionProvider"]


def weight(name, shape=(32, 32), external=True):
    made = building.tensor(np.zeros(shape, np.float32), name)
    if external:
        set_external_data(made, "weights", offset=0, length=len(made.raw_data))
        made.ClearField("raw_data")
    return made


def graph(*nodes, weights=("w",), external=True, **more):
    inputs = [building.floats("x")]
    made = [weight(name, external=external) for name in weights]
    return building.model(nodes, inputs, [building.floats("y")], made, **more).SerializeToString()


def node(kind, *inputs, output="y", **attributes):
    return helper.make_node(kind, list(inputs) or ["x", "w"], [output], **attributes)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Add", "Gather", "LayerNormalization"])
def test_operators_that_read_weights_when_they_run(kind):
    assert weights_may_come_later(graph(node(kind)), PLAIN)


@pytest.mark.parametrize("kind", ["MatMulNBits", "QMoE", "GatherBlockQuantized", "LSTM", "Unheard"])
def test_operators_that_may_read_them_when_they_are_made(kind):
    assert not weights_may_come_later(graph(node(kind, domain="com.microsoft")), PLAIN)
    later = graph(node("MatMul", "x", "w", output="h"), node(kind, "h", "v"), weights=("w", "v"))
    assert not weights_may_come_later(later, PLAIN)


def test_what_reads_no_external_weight_does_not_matter():
    assert weights_may_come_later(graph(node("MatMulNBits", "x", "i"), weights=("i",), external=False), PLAIN)
    assert weights_may_come_later(graph(node("MatMul", output="h"), node("MatMulNBits", "h", "h")), PLAIN)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    ("nhwc", "may"),
    [(None, True), ("0", True), ("false", True), ("False", True), (False, True), ("1", False), (True, False)],
)
def test_convolutions_unless_their_weights_are_moved(kind, nhwc, may):
    options = {"device_id": "0"} if nhwc is None else {"prefer_nhwc": nhwc}
    assert weights_may_come_later(graph(node(kind)), [(CUDA, options), "CPUExecutionProvider"]) is may
    assert weights_may_come_later(graph(node("MatMul")), [(CUDA, options)])


def branch(kind, name="w", weights=()):
    inner = helper.make_node(kind, ["x", name], ["z"])
    return helper.make_graph([inner], "branch", [], [building.floats("z")], initializer=list(weights))


@pytest.mark.parametrize(("kind", "may"), [("MatMul", True), ("MatMulNBits", False)])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_bodies_count(kind, may, where):
    """With a weight of the graph around them, and with one of their own."""
    own = [weight("own")] if where == "inside" else []
    name = "own" if own else "w"
    choice = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("MatMul"), else_branch=branch(kind, name, own)
    )
    made = building.model(
        [choice],
        [building.floats("x"), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [building.floats("y")],
        [weight("w")],
    )
    assert weights_may_come_later(made.SerializeToString(), PLAIN) is may


def test_a_function_with_the_name_of_an_operator_is_none():
    assert not weights_may_come_later(graph(node("MatMul", domain="mine"), domains=["mine"]), PLAIN)


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(module, "maps_weights", lambda pool: False)
    monkeypatch.setattr(
        module, "builds_early", lambda pool, *given: weights_may_come_later(given[0].graph, [])
    )
    with gi.Pool(device="cpu", limit="256MiB") as pool:
        Residency.of(pool, copies=True)
        yield pool
        gc.collect()
        pool.check_invariants()


@pytest.fixture
def package(tmp_path, store):
    path = building.save(building.inline(), tmp_path / "model.onnx")
    gi.convert(path, tmp_path / "model.glake", store=store)
    return tmp_path / "model.glake"


@pytest.fixture
def arrived(monkeypatch):
    """How often weights came beside the building of a session."""
    seen, arriving = [], Holding.arriving

    def counted(self):
        seen.append(self)
        return arriving(self)

    monkeypatch.setattr(Holding, "arriving", counted)
    return seen


def test_a_session_that_is_built_meanwhile_computes_the_same(pool, package, store, arrived):
    model = gi.load(package, pool, store=store)
    feeds = building.feeds_for(building.inline())
    expected = building.run_plain(building.inline(), feeds)["y"]
    np.testing.assert_allclose(model.run(feeds)["y"], expected, rtol=1e-5, atol=1e-6)
    assert len(arrived) == 1
    model.close()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_session_that_cannot_be_built_leaves_nothing(pool, package, store, arrived, monkeypatch, error):
    def fail(holding):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "guarded_session", fail)
        with pytest.raises(error):
            gi.load(package, pool, store=store)
    assert len(arrived) == 1
    assert arrived[0].closed
    assert Residency.of(pool).users() == {}
    assert pool.stats().active == 0
    gi.load(package, pool, store=store).close()


def test_weights_that_cannot_be_read_are_the_error_and_nothing_is_left(pool, package, store, arrived):
    model = gi.load(package, pool, store=store)
    model.close()
    pool.trim()
    gc.collect()
    for path in store.root.rglob("*"):
        if path.is_file() and path.stat().st_size == 4096:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(gi.DigestMismatchError):
        gi.load(package, pool, store=store)
    assert all(holding.closed for holding in arrived)
    assert Residency.of(pool).users() == {}
    assert pool.stats().active == 0


def test_threads_do_not_spin_unless_somebody_wants_that():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.inter_op.allow_spinning", "1")
    module._stop_spinning(options)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.inter_op.allow_spinning") == "1"
