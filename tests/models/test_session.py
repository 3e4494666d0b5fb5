"""The session of a model: every run of it is a use of the holding, nothing else is. Models that sleep: test_suspend.py."""

import gc
import threading
import weakref

import building
import numpy as np
import onnxruntime as ort
import pytest

import glake_infer as gi
from glake_infer.models.session import guarded_session


class Holding:
    """Counts its uses; `error` is raised where a use begins."""

    def __init__(self):
        self.events, self.error, self.inside, self.most = [], None, 0, 0
        self._lock = threading.Lock()

    def __enter__(self):
        if self.error:
            raise self.error
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.events.append("begin")
        return self

    def __exit__(self, *error):
        with self._lock:
            self.inside -= 1
            self.events.append("end")


@pytest.fixture
def model():
    return building.inline()


@pytest.fixture
def feeds(model):
    return building.feeds_for(model)


@pytest.fixture
def holding():
    return Holding()


@pytest.fixture
def session(model, holding):
    return make(model, holding)


def make(model, holding, **options):
    return guarded_session(holding)(model.SerializeToString(), providers=["CPUExecutionProvider"], **options)


def runs(session, feeds):
    """Each way to run a session, as what returns its first output."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    names = [output.name for output in session.get_outputs()]

    def bound():
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def vectors():
        state = ort.capi.onnxruntime_pybind11_state
        given, results = state.OrtValueVector(), state.OrtValueVector()
        for value in values.values():
            given.push_back(value._ortvalue)
        cpu = state.OrtDevice(state.OrtDevice.cpu(), state.OrtDevice.default_memory(), 0)
        session.run_with_ortvaluevector(
            ort.RunOptions(), list(values), given, names, results, [cpu] * len(names)
        )
        return next(iter(results)).numpy()

    return {
        "run": lambda: session.run(None, feeds)[0],
        "run_with_iobinding": bound,
        "run_with_ort_values": lambda: session.run_with_ort_values(None, values)[0].numpy(),
        "run_with_ortvaluevector": vectors,
    }


WAYS = ["run", "run_with_iobinding", "run_with_ort_values", "run_with_ortvaluevector"]
ways = pytest.mark.parametrize("way", WAYS)


def test_no_way_to_run_is_forgotten(session):
    """A new ONNX Runtime may have more of them."""
    found = {name for name in dir(ort.InferenceSession) if name.startswith("run")}
    assert found == {*WAYS, "run_async"}
    assert found <= vars(type(session)).keys()


@ways
def test_every_run_is_one_use_and_answers_as_plain_onnxruntime(session, holding, model, feeds, way):
    expected = next(iter(building.run_plain(model, feeds).values()))
    for count in (1, 2):
        np.testing.assert_array_equal(runs(session, feeds)[way](), expected)
        assert holding.events == ["begin", "end"] * count


def test_nothing_else_is_a_use(session, holding, feeds):
    assert [value.name for value in session.get_inputs()] == list(feeds)
    assert session.get_providers() == ["CPUExecutionProvider"]
    session.get_modelmeta()
    session.io_binding()
    with pytest.raises(gi.GlakeError, match="run_async is not possible"):
        session.run_async(None, feeds, lambda *_: None, None)
    assert holding.events == []


@ways
def test_weights_that_cannot_come_back_end_the_run_before_it_begins(session, holding, model, feeds, way):
    holding.error = gi.StoreError("the store is gone")
    run = runs(session, feeds)[way]
    with pytest.raises(gi.StoreError, match="the store is gone"):
        run()
    assert holding.events == []
    holding.error = None
    np.testing.assert_array_equal(run(), next(iter(building.run_plain(model, feeds).values())))


@ways
def test_a_run_that_fails_ends_its_use(session, holding, model, feeds, way):
    """With ONNX Runtime's own error: who takes the session deals with it as with any other."""
    wrong = {name: np.zeros((3, building.SIDE + 1), np.float32) for name in feeds}
    with pytest.raises(Exception, match=r"invalid dimensions|INVALID_ARGUMENT|dimension") as caught:
        runs(session, wrong)[way]()
    assert not isinstance(caught.value, gi.GlakeError)
    assert holding.events == ["begin", "end"]
    np.testing.assert_array_equal(
        runs(session, feeds)[way](), next(iter(building.run_plain(model, feeds).values()))
    )


def test_threads_run_it_together(session, holding, model, feeds):
    """The guard does not make them wait for one another."""
    expected = next(iter(building.run_plain(model, feeds).values()))
    barrier, problems, begin = threading.Barrier(4, timeout=20), [], holding.__enter__

    def meet():
        begin()
        barrier.wait()
        return holding

    session._holding = meeting = type("Meeting", (), {})()
    type(meeting).__enter__ = lambda self: meet()
    type(meeting).__exit__ = lambda self, *error: holding.__exit__(*error)

    def work(way):
        try:
            np.testing.assert_array_equal(runs(session, feeds)[way](), expected)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(way,)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert (holding.most, holding.inside) == (4, 0)


def test_it_passes_for_onnxruntimes_own(model, feeds, session, tmp_path):
    """Its class, its options, from bytes and from a file; each session has its own holding."""
    assert isinstance(session, ort.InferenceSession)
    assert type(session).__name__ == type(session).__qualname__ == "InferenceSession"
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    other, path = Holding(), building.save(model, tmp_path / "model.onnx")
    from_file = guarded_session(other)(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    assert type(from_file) is type(session)
    assert from_file.get_session_options().log_severity_level == 3
    options = ort.RunOptions()
    options.logid = "x"
    np.testing.assert_array_equal(
        from_file.run([output.name for output in session.get_outputs()], feeds, run_options=options)[0],
        session.run(None, feeds, options)[0],
    )
    assert other.events == session._holding.events == ["begin", "end"]


def test_the_holding_lives_no_longer_than_its_session(model, feeds):
    holding = Holding()
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        guarded_session(holding)(b"no model", providers=["CPUExecutionProvider"])
    assert holding.events == []
    session, kept = make(model, holding), weakref.ref(holding)
    session.run(None, feeds)
    del holding
    gc.collect()
    assert kept() is not None
    del session
    gc.collect()
    assert kept() is None
