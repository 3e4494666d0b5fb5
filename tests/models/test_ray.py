"""Ray Serve: replicas that share weights. What needs Ray itself runs in processes of its own, as in production."""

import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import machines
import processes
import pytest

import glake_infer as gi
from glake_infer.models import ray as serving
from glake_infer.models import zoo
from glake_infer.models.node_packages import Packages

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
TINY = functools.partial(zoo.spec, "bert-tiny")


@pytest.fixture
def archive(store, tmp_path):
    zoo.convert(TINY(head="a"), tmp_path / "a.glake", store=store)
    gi.export_archive(tmp_path / "a.glake", tmp_path / "a.tar", store=store)
    return tmp_path / "a.tar"


# packages of a node


def test_a_package_is_used_where_it_is(store, tmp_path):
    zoo.convert(TINY(), tmp_path / "a.glake", store=store)
    assert serving.local_package(tmp_path / "a.glake", store) == tmp_path / "a.glake"


def test_an_archive_is_taken_once(archive, tmp_path):
    node = gi.Store(tmp_path / "node")
    first = serving.local_package(archive, node)
    times = {path: path.stat().st_mtime_ns for path in node.root.rglob("*") if path.name == "manifest.json"}
    assert first.name == "a.glake"
    assert first.is_relative_to(node.root)
    assert len(times) == 1
    again = serving.local_package(str(archive), node)
    assert again == first
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    gi.Package(first, node).check_present()


def test_an_archive_that_was_replaced_is_taken_anew(archive, store, tmp_path):
    node = gi.Store(tmp_path / "node")
    first = serving.local_package(archive, node)
    zoo.convert(TINY(head="b"), tmp_path / "b.glake", store=store)
    gi.export_archive(tmp_path / "b.glake", archive, store=store)
    second = serving.local_package(archive, node)
    assert second != first
    assert gi.Package(second, node).manifest.identity != gi.Package(first, node).manifest.identity


def test_a_weight_that_is_gone_is_brought_back_from_the_archive(archive, tmp_path):
    node = gi.Store(tmp_path / "node")
    taken = gi.Package(serving.local_package(archive, node), node)
    lost = node.objects.path(next(iter(taken.manifest.distinct)))
    lost.unlink()
    serving.local_package(archive, node)
    assert lost.exists()


def test_processes_that_come_at_once_take_an_archive_once(archive, tmp_path, python):
    code = """
        import sys
        import glake_infer as gi
        from glake_infer.models import node_packages as ray
        taken = []
        take = ray.import_archive
        ray.import_archive = lambda *a, **k: (taken.append(1), take(*a, **k))
        print("ready", flush=True)
        sys.stdin.readline()
        path = ray.local_package(sys.argv[1], gi.Store(sys.argv[2]))
        gi.Package(path, gi.Store(sys.argv[2])).check_present()
        print(len(taken))
    """
    started = [python(code, archive, tmp_path / "node", stdin=subprocess.PIPE) for _ in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(counts) == [0, 0, 0, 1]


def test_what_is_no_archive_is_refused(store, tmp_path, archive):
    (tmp_path / "b.tar").write_bytes(b"something else")
    with pytest.raises(gi.PackageError, match=r"b\.tar is not a glake-infer archive"):
        serving.local_package(tmp_path / "b.tar", store)
    half = archive.read_bytes()[: archive.stat().st_size // 2]
    (tmp_path / "c.tar").write_bytes(half)
    with pytest.raises(gi.PackageError, match="truncated"):
        serving.local_package(tmp_path / "c.tar", gi.Store(tmp_path / "other"))
    with pytest.raises(gi.PackageError, match="does not exist"):
        Packages(tmp_path / "nowhere")


def test_models_are_found_by_name(store, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    zoo.convert(TINY(), folder / "a.glake", store=store)
    gi.export_archive(folder / "a.glake", folder / "b.glake.tar", store=store)
    gi.export_archive(folder / "a.glake", folder / "c.tar", store=store)
    zoo.convert(TINY(), tmp_path / "outside.glake", store=store)

    one = Packages(folder / "a.glake")
    assert (one.only, one.names(), one.find("a")) == ("a", ["a"], folder / "a.glake")
    assert Packages(folder / "c.tar").only == "c"

    many = Packages(folder)
    assert (many.only, many.names()) == (None, ["a", "b", "c"])
    assert [many.find(name).name for name in "abc"] == ["a.glake", "b.glake.tar", "c.tar"]
    for name in ("../outside", "outside", ".a", "", "..", "a/../a", "/", str(tmp_path / "outside")):
        with pytest.raises(serving.UnknownModelError, match="there are a, b, c"):
            many.find(name)

    named = Packages({"x": folder / "a.glake"})
    assert (named.only, named.find("x")) == ("x", folder / "a.glake")
    with pytest.raises(gi.InputError, match="empty"):
        Packages({})


# what Ray says of this process


def fake_ray(monkeypatch, *, gpus=(), cpus=1.0, worker=True):
    context = SimpleNamespace(
        worker=SimpleNamespace(mode=1 if worker else 0),
        get_accelerator_ids=lambda: {"GPU": list(gpus), "TPU": []},
        get_assigned_resources=lambda: {"CPU": cpus} if cpus else {},
    )
    fake = SimpleNamespace(is_initialized=lambda: True, WORKER_MODE=1, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", fake)


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        ([], None, "cpu"),
        ([], "0,1", "cpu"),
        (["3"], "3", "cuda:0"),  # as Ray sets it
        (["1", "3"], "1,3", "cuda:0"),
        (["3"], "1,3", "cuda:1"),
        (["GPU-8a5c"], "GPU-77e0, GPU-8a5c", "cuda:1"),
        (["2"], None, "cuda:2"),  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES
        (["2"], "5", "cuda:0"),
    ],
)
def test_the_device_is_the_one_that_ray_assigned(monkeypatch, gpus, visible, expected):
    fake_ray(monkeypatch, gpus=gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serving.assigned_device() == expected


def test_outside_of_workers_nothing_is_assigned(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert serving.assigned_device() is None
    fake_ray(monkeypatch, worker=False, gpus=["0"])
    assert serving.assigned_device() is None
    assert serving.assigned_threads() is None


@pytest.mark.parametrize(("cpus", "threads"), [(4.0, 4), (0.5, 1), (0, 1), (2.5, 2)])
def test_threads_are_the_cpus_that_ray_assigned(monkeypatch, cpus, threads):
    fake_ray(monkeypatch, cpus=cpus)
    assert serving.assigned_threads() == threads


# one Runtime per process


@pytest.fixture
def alone(monkeypatch):
    """No Ray, no broker, and no Runtime left behind."""
    monkeypatch.setenv("GLAKE_BROKER", "off")
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    yield
    for shared in serving._shared.values():
        shared.runtime.close()
    serving._shared.clear()


def test_a_process_has_one_runtime(alone):
    first = serving.replica_runtime("1GiB", device="cpu")
    assert serving.replica_runtime("1GiB", device="cpu") is first
    assert first.pool.stats().limit == 1 << 30
    with pytest.raises(gi.InputError, match=r"limit='2GiB'.*has a Runtime on cpu with limit='1GiB'"):
        serving.replica_runtime("2GiB", device="cpu")
    first.close()
    second = serving.replica_runtime("2GiB", device="cpu")
    assert second is not first


def test_the_last_deployment_closes_the_runtime(alone):
    first, second = (serving._enter("1GiB", "cpu", None) for _ in range(2))
    assert first is second
    serving._leave(first)
    assert gi.Pool.current("cpu") is first.runtime.pool
    serving._leave(second)
    assert gi.Pool.current("cpu") is None
    third = serving._enter("1GiB", "cpu", None)
    assert serving.replica_runtime("1GiB", device="cpu") is third.runtime
    serving._leave(third)
    assert gi.Pool.current("cpu") is third.runtime.pool  # somebody else has it too


def test_without_ray_the_error_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    for attempt in (serving.import_serve, lambda: serving.build({"packages": "a.glake"})):
        with pytest.raises(gi.MissingDependencyError, match=r"pip install 'glake-infer\[ray\]'"):
            attempt()
    with pytest.raises(gi.MissingDependencyError):
        serving.GlakeModel("a.glake")


def test_importing_the_module_imports_no_ray():
    done = processes.run("import sys, glake_infer.models.ray; print('ray' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_build_needs_packages():
    with pytest.raises(gi.InputError, match="args has limit; expected packages"):
        serving.build({"limit": "1GiB"})


# the deployment's class, without a cluster


def run(code, *arguments, **environment):
    """Run code, with the names below, in a process that may import Ray; returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")  # a traceback then shows its lines
        script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(code))
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env={**processes.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


HEAD = """
    import asyncio, json, os, signal, sys, time
    from pathlib import Path
    import numpy as np
    import glake_infer as gi
    from glake_infer.models import zoo
    from glake_infer.models.model import ModelClosedError
    from glake_infer.models.ray import GlakeModel, UnknownModelError, Request

    def spec(head):
        return zoo.spec("bert-tiny", head=head)

    def feeds(seed=0, **sizes):
        return zoo.feeds(spec("a"), seed, **sizes)

    def same(results, expected):
        assert results.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(results[name], array) and results[name].dtype == array.dtype

    def until(check, seconds=60):
        end = time.monotonic() + seconds
        while not (found := check()):
            assert time.monotonic() < end, "it did not come to be"
            time.sleep(0.1)
        return found
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the packages a and b, in a store of their own."""
    folder = tmp_path_factory.mktemp("models")
    for head in "ab":
        zoo.convert(
            TINY(head=head), folder / f"{head}.glake", store=gi.Store(folder.parent / f"{folder.name}-store")
        )
    return folder


def store_of(models):
    return str(models.parent / f"{models.name}-store")


@needs_ray
def test_models_by_name_and_errors(models):
    code = """
        async def main():
            here = GlakeModel(sys.argv[1], preload=["a"])
            assert list(here.models) == ["a"]
            with gi.load(f"{sys.argv[1]}/b.glake", here.runtime.pool) as plain:
                expected = plain.run(feeds())
            same(await here.run(feeds(), model="b"), expected)
            assert sorted(here.models) == ["a", "b"]
            for wrong, named in ((feeds(), None), (feeds(), "c"), (feeds(), "../models/a")):
                try:
                    await here.run(wrong, model=named)
                    raise SystemExit("no error")
                except UnknownModelError as error:
                    assert "there are a, b" in str(error)
            here.check_health()
            found = json.loads(json.dumps(here.statistics()))
            assert found["device"] == "cpu" and found["connected"] is None and sorted(found["models"]) == ["a", "b"]
            here.close()
            here.close()
            assert gi.Pool.current("cpu") is None
        asyncio.run(main())
    """
    run(code, models, GLAKE_STORE=store_of(models), GLAKE_BROKER="off")


@needs_ray
def test_requests_are_joined_where_they_can_be(models):
    code = """
        async def main():
            here = GlakeModel({name: f"{sys.argv[1]}/{name}.glake" for name in "ab"}, preload="ab", max_batch_size=8)
            def ask(name, fed, outputs=None):
                return Request(name, fed, outputs)
            fitting = [feeds(i, batch=1 + i % 3) for i in range(4)]
            longer = feeds(9, length=24)
            bad = {**feeds(), "input_ids": [[1.5]]}
            other = feeds(7)
            asked = [*(ask("a", fed) for fed in fitting), ask("a", longer), ask("a", bad), ask("b", other),
                     ask("b", other, ["nothing"]), ask("a", {name: array.tolist() for name, array in other.items()})]
            done = here._run_batch(asked)
            assert here.models["a"].runs == 2, here.models["a"].runs  # those that fit, with the lists; the longer one
            with gi.load(f"{sys.argv[1]}/a.glake", here.runtime.pool) as plain:
                for fed, results in zip([*fitting, longer, other], [*done[:5], done[8]]):
                    for name, array in plain.run(fed).items():
                        assert results[name].shape == array.shape and np.abs(results[name] - array).max() < 1e-5
            assert isinstance(done[5].error, gi.InputError) and "input_ids" in str(done[5].error)
            assert done[6]["logits"].shape == (1, 2)
            assert isinstance(done[7].error, gi.InputError) and "nothing" in str(done[7].error)

            # a batch that does not fit into the limit is run one by one
            model, whole = here.models["a"], here.models["a"].run
            def small(fed, outputs=None):
                if len(fed["input_ids"]) > 1:
                    raise gi.GlakeError("too large")
                return whole(fed, outputs)
            model.run = small
            done = here._run_batch([ask("a", feeds(i)) for i in range(3)])
            assert [results["logits"].shape for results in done] == [(1, 2)] * 3
            here.close()
        asyncio.run(main())
    """
    run(code, models, GLAKE_STORE=store_of(models), GLAKE_BROKER="off")


@needs_ray
def test_a_new_version_takes_the_old_ones_place_while_requests_go_on(models):
    code = """
        async def main():
            folder = sys.argv[1]
            here = GlakeModel({"x": f"{folder}/a.glake", "y": f"{folder}/b.glake"}, preload="xy")
            expected = []
            for name in "ab":
                with gi.load(f"{folder}/{name}.glake", here.runtime.pool) as plain:
                    expected.append(plain.run(feeds()))
            old, kept = here.models["x"], here.models["y"]
            going, seen = True, []
            async def ask():
                while going:
                    results = await here.run(feeds(), model="x")
                    seen.append([i for i in (0, 1) if np.array_equal(results["logits"], expected[i]["logits"])])
            asking = [asyncio.create_task(ask()) for _ in range(3)]
            await asyncio.sleep(0.2)
            await here.reconfigure({"packages": {"x": f"{folder}/b.glake", "y": f"{folder}/b.glake"}})
            await asyncio.sleep(0.2)
            going = False
            await asyncio.gather(*asking)
            assert [0] in seen and seen[-1] == [1] and all(seen), seen[-5:]
            assert old.closed and here.models["y"] is kept and not kept.closed

            class Closing:  # between being found and being run
                def run(self, *arguments):
                    here._models["x"] = current
                    raise ModelClosedError("closed")
            current, here._models["x"] = here._models["x"], Closing()
            same(await here.run(feeds(), model="x"), expected[1])

            before, limit = here.models, here.runtime.pool.limit
            for wrong in ({"packages": {"x": f"{folder}/nothing.glake"}}, {"packages": f"{folder}/nothing.glake"},
                          {"colour": "blue"}, {"max_batch_size": 0}, {"limit": 1},
                          {"limit": "1GiB", "packages": f"{folder}/nothing.glake"}):
                try:
                    await here.reconfigure(wrong)
                    raise SystemExit(f"{wrong}: no error")
                except gi.GlakeError:
                    pass
            assert here.models == before and here.runtime.pool.limit == limit
            same(await here.run(feeds(), model="x"), expected[1])
            await here.reconfigure({"packages": f"{folder}/a.glake", "limit": "1GiB", "max_batch_size": 4})
            assert list(here.models) == ["a"] and kept.closed and here.runtime.pool.limit == 1 << 30
            same(await here.run(feeds()), expected[0])
            here.close()
        asyncio.run(main())
    """
    run(code, models, GLAKE_STORE=store_of(models), GLAKE_BROKER="off")


@needs_ray
def test_a_gpu_that_failed_makes_the_replica_unhealthy(models):
    code = """
        async def main():
            here = GlakeModel(f"{sys.argv[1]}/a.glake")
            whole = here.models["a"].run
            def fail(*arguments):
                raise gi.DriverError("CUDA_ERROR_ILLEGAL_ADDRESS")
            here.models["a"].run = fail
            try:
                await here.run(feeds())
            except gi.DriverError:
                pass
            try:
                here.check_health()
                raise SystemExit("it is healthy")
            except gi.DriverError as error:
                assert "ILLEGAL" in str(error)
            here.models["a"].run = whole
            await here.run(feeds())
            here.check_health()
            here.close()
        asyncio.run(main())
    """
    run(code, models, GLAKE_STORE=store_of(models), GLAKE_BROKER="off")


@needs_ray
def test_deployments_of_one_process_share_its_runtime(models):
    code = """
        import logging
        from ray import serve
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

        @serve.deployment
        class Both:
            def __init__(self, *parts):
                self.parts = parts
            async def __call__(self, fed):
                return [await part.remote(fed) for part in self.parts]
        parts = [serve.deployment(GlakeModel, name=name).bind(f"{sys.argv[1]}/{name}.glake") for name in "ab"]
        handle = serve.run(Both.bind(*parts), _local_testing_mode=True)
        results = handle.remote(feeds()).result()
        with gi.load(f"{sys.argv[1]}/b.glake", gi.Pool.current("cpu")) as plain:
            same(results[1], plain.run(feeds()))
        assert gi.Pool.current("cpu").stats().mapped_files < 2 * plain.package.manifest.weight_bytes
        print("shared")
    """
    assert "shared" in run(code, models, GLAKE_STORE=store_of(models), GLAKE_BROKER="off")


# a cluster


class Cluster:
    """Ray on this machine, with folders of its own for everything."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment

    def start(self):
        code = """
            import socket, sys, ray
            from ray import serve
            ray.init(num_cpus=16, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            print(ray.get_runtime_context().gcs_address, port, flush=True)
            sys.stdin.read()
            serve.shutdown()
            ray.shutdown()
        """
        self.log = (self.folder / "head.log").open("w")
        self.head = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**processes.environment(), **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        line = self.head.stdout.readline()
        assert line, (self.folder / "head.log").read_text()
        self.environment["RAY_ADDRESS"], self.environment["SERVE_PORT"] = line.split()

    def run(self, code, *arguments):
        start = """
            import logging, urllib.error, urllib.request
            import ray
            from ray import serve
            from glake_infer.window.observe import broker_socket, observe
            ray.init(log_to_driver=False)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            from ray.serve.context import _get_global_client
            from ray.serve.schema import ServeDeploySchema
            QUICK = {"graceful_shutdown_wait_loop_s": 0.1, "health_check_period_s": 1}

            def deploy(name, args, **options):
                # what `serve deploy` does with a config file; unlike serve.run it leaves replicas alone that may stay
                made = {"name": "GlakeModel", **QUICK, **options}
                app = {"name": name, "route_prefix": f"/{name}", "import_path": "glake_infer.models.ray:build",
                       "args": args, "deployments": [made]}
                _get_global_client().deploy_apps(ServeDeploySchema(applications=[app]), _blocking=True)
                until(lambda: serve.status().applications[name].status == "RUNNING")
                return serve.get_app_handle(name)

            def clients():
                try:
                    return {process.pid for device in observe(broker_socket()).devices for process in device.processes}
                except gi.GlakeError:
                    return set()

            def replicas(handle, count):
                def ask():
                    answers = [handle.statistics.remote() for _ in range(4 * count)]
                    for answer in answers:
                        try:
                            found = answer.result(timeout_s=30)
                        except Exception:
                            continue  # a replica that was killed
                        seen[found["pid"]] = found
                    return len(seen) >= count and seen
                seen = {}
                return until(ask)

            def post(path, body, model=None):
                headers = {"serve_multiplexed_model_id": model} if model else {}
                address = f"http://127.0.0.1:{os.environ['SERVE_PORT']}{path}"
                try:
                    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60) as answer:
                        return answer.status, json.load(answer)
                except urllib.error.HTTPError as error:
                    with error:
                        return error.code, json.load(error)
        """
        return run(textwrap.dedent(start) + textwrap.dedent(code), *arguments, **self.environment)

    def close(self):
        if hasattr(self, "head"):
            self.head.communicate(timeout=60)
            self.log.close()


@pytest.fixture(scope="module")
def cluster(models):
    with machines.machine() as (folder, environment):
        made = Cluster(folder, {**environment, "GLAKE_STORE": store_of(models)})
        try:
            made.start()
            yield made
        finally:
            made.close()


@needs_ray
def test_replicas_serve_several_models(cluster, models):
    code = """
        folder = sys.argv[1]
        app = serve.deployment(GlakeModel, num_replicas=2, max_ongoing_requests=16, **QUICK).bind(
            folder, max_batch_size=4, batch_wait_timeout_s=0.02)
        handle = serve.run(app, name="many", route_prefix="/many")
        pool = gi.Pool("cpu", broker="off")
        plain = {name: gi.load(f"{folder}/{name}.glake", pool) for name in "ab"}
        for name in "ab":
            asked = [(i, handle.options(multiplexed_model_id=name).remote(feeds(i))) for i in range(16)]
            for i, answer in asked:
                expected = plain[name].run(feeds(i))["logits"]
                assert np.abs(answer.result()["logits"] - expected).max() < 1e-5
        same(handle.options(multiplexed_model_id="b").remote(feeds()).result(), plain["b"].run(feeds()))
        same(handle.run.remote(feeds(), model="a").result(), plain["a"].run(feeds()))
        for wrong, kind in (("c", UnknownModelError), (None, UnknownModelError), ("a", gi.InputError)):
            named = handle.options(multiplexed_model_id=wrong) if wrong else handle
            try:
                named.remote({"nothing": [1]} if kind is gi.InputError else feeds()).result()
                raise SystemExit("no error")
            except kind as error:
                assert "there are a, b" in str(error) or "nothing" in str(error)

        body = json.dumps({name: array.tolist() for name, array in feeds().items()}).encode()
        status, answer = post("/many", body, "b")
        assert status == 200
        assert np.array_equal(np.array(answer["logits"], np.float32), plain["b"].run(feeds())["logits"])
        for data, name, status in ((body, "c", 404), (body, None, 404), (b"{", "a", 400), (b"[1]", "a", 400),
                                   (b'{"nothing": 1}', "a", 400), (b"\\xff", "a", 400)):
            answered = post("/many", data, name)
            assert answered[0] == status and answered[1]["error"], answered
        assert post("/many", None)[1]["models"] == ["a", "b"]

        found = replicas(handle, 2)
        assert all(each["connected"] and each["device"] == "cpu" for each in found.values())
        status = observe(broker_socket())
        (device,) = status.devices
        assert {process.pid for process in device.processes} == set(found)
        assert all(process.name.startswith("many/GlakeModel/") for process in device.processes)
        distinct = {**plain["a"].package.manifest.distinct, **plain["b"].package.manifest.distinct}
        assert 0 < device.weights <= sum(distinct.values()) + (1 << 20)
        serve.delete("many")
        until(lambda: not clients())
        print("done")
    """
    assert "done" in cluster.run(code, models)


@needs_ray
def test_a_new_version_comes_without_new_replicas(cluster, models):
    code = """
        folder = sys.argv[1]
        pool = gi.Pool("cpu", broker="off")
        plain = {name: gi.load(f"{folder}/{name}.glake", pool) for name in "ab"}
        pids = []
        for name in "ab":
            packages = {"model": f"{folder}/{name}.glake"}
            handle = deploy("one", {"packages": {"model": f"{folder}/a.glake"}}, num_replicas=2,
                            user_config={"packages": packages, "max_batch_size": 1})
            until(lambda: np.array_equal(
                handle.remote(feeds()).result()["logits"], plain[name].run(feeds())["logits"]))
            pids.append(set(replicas(handle, 2)))
        assert pids[0] == pids[1]
        serve.delete("one")
        print("done")
    """
    assert "done" in cluster.run(code, models)


@needs_ray
def test_crashes(cluster, models):
    code = """
        folder = sys.argv[1]
        scale = lambda count: deploy("crash", {"packages": f"{folder}/a.glake"}, num_replicas=count)
        handle = scale(2)
        with gi.load(f"{folder}/a.glake", gi.Pool("cpu", broker="off")) as plain:
            expected = plain.run(feeds())
        def works():
            try:
                same(handle.remote(feeds()).result(timeout_s=30), expected)
                return True
            except ray.exceptions.RayError:
                return False
        first = replicas(handle, 2)
        broker = observe(broker_socket()).broker.pid

        # a replica is killed: the others serve on, and another comes
        os.kill(min(first), signal.SIGKILL)
        until(works)
        until(lambda: set(replicas(handle, 2)) - set(first))
        assert observe(broker_socket()).broker.pid == broker

        # the broker is killed: all serve on, are healthy, and meet again at the next one, where new ones come too
        second = until(lambda: (found := set(replicas(handle, 2))) - {min(first)} == found and found)
        os.kill(broker, signal.SIGKILL)
        for _ in range(20):
            assert works()
        until(lambda: all(each["connected"] for each in replicas(handle, 2).values()))
        assert observe(broker_socket()).broker.pid != broker
        handle = scale(3)
        third = replicas(handle, 3)
        assert set(second) < set(third)
        assert all(each["connected"] for each in third.values())
        for _ in range(20):
            assert works()

        # the replica that started the broker ends in good order: the broker stays
        broker = observe(broker_socket()).broker.pid
        handle = scale(1)
        until(lambda: len(clients()) == 1)
        assert works() and observe(broker_socket()).broker.pid == broker
        serve.delete("crash")
        until(lambda: not clients())
        assert observe(broker_socket()).broker.pid == broker
        print("done")
    """
    assert "done" in cluster.run(code, models)


@needs_ray
def test_a_part_of_a_gpu_is_the_first_that_the_replica_sees(cluster):
    """Ray is told of two GPUs, which nobody opens."""
    code = """
        from glake_infer.models.ray import assigned_device, assigned_threads

        @ray.remote
        class Worker:
            def where(self):
                return assigned_device(), assigned_threads(), os.environ.get("CUDA_VISIBLE_DEVICES")
        def ask(count, **options):
            workers = [Worker.options(**options).remote() for _ in range(count)]
            return ray.get([worker.where.remote() for worker in workers])
        found = ask(4, num_gpus=0.5, num_cpus=2)
        assert {(device, threads) for device, threads, _ in found} == {("cuda:0", 2)}
        assert sorted(visible for *_, visible in found) == ["0", "0", "1", "1"]
        assert [each[0] for each in ask(1, num_cpus=1)] == ["cpu"]
        alone = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        until(lambda: ray.available_resources().get("GPU") == 2)
        assert {each[0] for each in ask(2, num_gpus=1, runtime_env=alone)} == {"cuda:0", "cuda:1"}
        print("done")
    """
    assert "done" in cluster.run(code)


@needs_ray
def test_the_page_runs(cluster, models, tmp_path):
    page = (Path(__file__).parents[2] / "docs/ray-serve.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    zoo.convert(TINY(), tmp_path / "sentiment.glake", store=gi.Store(store_of(models)))
    block = block.replace("sentiment.glake", str(tmp_path / "sentiment.glake"))
    config = config.replace("num_gpus: 0.25", "num_gpus: 0").replace("num_replicas: 4", "num_replicas: 1")
    config = re.sub(r"/models/v\d", str(tmp_path), config)
    code = f"""
import yaml
{block}
assert results["logits"].shape == (1, 2)
serve.delete("sentiment")
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load({config!r})), _blocking=True)
again = serve.get_app_handle("sentiment").remote(zoo.feeds(zoo.spec("bert-tiny"), 0)).result()
same(again, results)
serve.delete("sentiment")
print("done")
"""
    assert "done" in cluster.run(code)


@needs_ray
@pytest.mark.soak  # a second cluster; that processes take an archive once, CI sees above
def test_each_node_takes_an_archive_once_and_has_its_own_broker(models):
    code = """
        import logging
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster
        from glake_infer.window.observe import observe
        folder = Path(sys.argv[1])
        gi.export_archive(Path(sys.argv[2]) / "a.glake", folder / "a.tar")
        cluster = Cluster()
        for node in ("n1", "n2"):
            (folder / node).mkdir(mode=0o700)
            os.environ.update(XDG_RUNTIME_DIR=str(folder / node), GLAKE_STORE=str(folder / node / "store"))
            cluster.add_node(num_cpus=3, include_dashboard=False, env_vars=dict(os.environ))
        cluster.wait_for_nodes()
        ray.init(cluster.address, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        made = serve.deployment(
            GlakeModel, num_replicas=4, max_replicas_per_node=2, ray_actor_options={"num_cpus": 1},
            graceful_shutdown_wait_loop_s=0.1)
        handle = serve.run(made.bind(str(folder / "a.tar")))
        seen = {}
        def all_seen():
            for answer in [handle.statistics.remote() for _ in range(16)]:
                seen[answer.result()["pid"]] = answer.result()["node"]
            return len(seen) == 4
        until(all_seen)
        assert sorted(map(list(seen.values()).count, set(seen.values()))) == [2, 2], seen
        for node in ("n1", "n2"):
            status = observe(folder / node / "glake-infer" / "broker.sock")
            assert len(status.devices[0].processes) == 2
            assert {process.pid for process in status.devices[0].processes} < set(seen)
            assert len(list((folder / node / "store" / "archives").glob("*/a.glake"))) == 1
        serve.delete("default")
        ray.shutdown()
        cluster.shutdown()
        print("done")
    """
    with machines.machine() as (folder, environment):
        printed = run(code, folder, models, **environment, GLAKE_STORE=store_of(models))
    assert "done" in printed
