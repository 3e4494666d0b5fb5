"""Scenes on the CPU, whose traces `benchmarks.traces` records; and where they get their sessions."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glake_infer.allocators import GlakeError, Pool

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

Job = Callable[[random.Random], None]


class Shop:
    """Makes sessions on a pool: of the zoo's models, written once into a folder, and of the real ones."""

    def __init__(self, pool: Pool, folder: Path, seconds: float, most: int) -> None:
        self._pool, self._folder, self._seconds, self._most = pool, folder, seconds, most
        self._numbers: dict[Any, int] = {}
        self._lock = threading.Lock()
        self.kind, _, index = pool.device.partition(":")  # as an IOBinding names a device
        self.index = int(index or 0)
        self.start()

    def start(self) -> None:
        """Begin the time anew: what came before (files written, libraries loaded) does not count."""
        self._end = time.monotonic() + self._seconds

    @property
    def open(self) -> bool:
        """Whether there is time left, and room in the trace."""
        stats = self._pool.stats()
        return time.monotonic() < self._end and stats.allocations + stats.deallocations < self._most

    def session(self, model: Any, *, pattern: bool = True) -> Any:
        """Make a session. pattern: ONNX Runtime may plan the activations of a known shape as one block."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = pattern
        options.log_severity_level = 3
        providers: list[Any] = self._pool.providers
        if self.kind == "cuda":  # an exhaustive search at every new shape would take the scene's time
            providers[0][1]["cudnn_conv_algo_search"] = "DEFAULT"
        with self._lock:
            self._pool.attach(options)
            session = ort.InferenceSession(str(self.path(model)), options, providers=providers)
        if self.kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise GlakeError("ONNX Runtime goes on with the CPU: it could not load its CUDA provider")
        return session

    def path(self, model: Any) -> Path:
        """Return the file of a zoo model (its spec) or of a real one (its name)."""
        import real_models

        from glake_infer.models import zoo

        if isinstance(model, str):
            found: Path = real_models.path_of(model)
            return found
        number = self._numbers.setdefault(repr(model), len(self._numbers))
        path = self._folder / f"{number}.onnx"
        if not path.exists():
            zoo.write(model, path)
        return path

    def threads(self, *jobs: Job) -> None:
        """Run every job over and over in a thread of its own; raises what a job raises."""
        errors: list[BaseException] = []

        def loop(job: Job, seed: int) -> None:
            rng = random.Random(seed)
            try:
                while self.open and not errors:
                    job(rng)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=loop, args=(job, seed)) for seed, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def run_real(name: str, session: Any, rng: random.Random) -> None:
    """Run a real model on one of its listed feeds; an encoder on a random batch too."""
    import real_models

    session.run(None, rng.choice(list(real_models.feeds_of(name))))
    if name.startswith("minilm"):
        shape = rng.randint(1, 32), rng.randint(8, 256)
        values = {
            "input_ids": np.full(shape, 2000),
            "attention_mask": np.ones(shape),
            "token_type_ids": np.zeros(shape),
        }
        session.run(None, {i.name: values[i.name].astype(np.int64) for i in session.get_inputs()})


def encoders(shop: Shop) -> None:
    """bert-tiny, bert-mini and minilm-l3 in turn, random batch and length."""
    from glake_infer.models import zoo

    tiny, mini = zoo.spec("bert-tiny"), zoo.spec("bert-mini")
    a, b, c = shop.session(tiny, pattern=False), shop.session(mini), shop.session("minilm-l3")
    rng = random.Random(1)
    while shop.open:
        seed = rng.randrange(10**6)
        a.run(None, zoo.feeds(tiny, seed, batch=rng.randint(1, 300), length=rng.randint(16, 512)))
        b.run(None, zoo.feeds(mini, seed, batch=rng.randint(1, 64), length=rng.choice([64, 128, 256, 384])))
        run_real("minilm-l3", c, rng)


def vision(shop: Shop) -> None:
    """ResNet-18, bert-tiny, ppocr-det and ppocr-rec in four threads, random batch and size."""
    from glake_infer.models import zoo

    resnet, tiny = zoo.spec("resnet18"), zoo.spec("bert-tiny")
    a, b = shop.session(resnet), shop.session(tiny)
    c, d = shop.session("ppocr-det", pattern=False), shop.session("ppocr-rec", pattern=False)

    def images(session: Any, batch: int, height: int, width: int) -> None:
        session.run(None, {"x": np.full((batch, 3, height, width), 0.5, np.float32)})

    def job_a(rng: random.Random) -> None:
        length = rng.choice([64, 96, 128, 160, 192])
        a.run(None, zoo.feeds(resnet, rng.randrange(10**6), batch=rng.randint(1, 160), length=length))

    def job_b(rng: random.Random) -> None:
        length = rng.randint(16, 512)
        b.run(None, zoo.feeds(tiny, rng.randrange(10**6), batch=rng.randint(1, 200), length=length))

    def job_c(rng: random.Random) -> None:
        images(c, rng.randint(1, 4), 32 * rng.randint(6, 24), 32 * rng.randint(6, 24))

    def job_d(rng: random.Random) -> None:
        images(d, rng.randint(1, 24), 48, 8 * rng.randint(10, 120))

    shop.threads(job_a, job_b, job_c, job_d)


def decode(shop: Shop) -> None:
    """Two threads of llama-tiny with growing caches beside bert-tiny, random batch and length."""
    from glake_infer.models import zoo

    llama, tiny = zoo.spec("llama-tiny"), zoo.spec("bert-tiny")
    a, b = shop.session(llama, pattern=False), shop.session(tiny)

    def talk(rng: random.Random) -> None:
        seed, batch = rng.randrange(10**6), rng.randint(1, 48)
        found = a.run(None, zoo.feeds(llama, seed, batch=batch, length=rng.randint(16, 200)))
        for _ in range(rng.randint(4, 24)):
            feeds = zoo.feeds(llama, seed, batch=batch, length=1, past=found[1].shape[2])
            feeds.update(zip([name for name in feeds if name.startswith("past")], found[1:], strict=True))
            found = a.run(None, feeds)

    def encode(rng: random.Random) -> None:
        length = rng.randint(16, 512)
        b.run(None, zoo.feeds(tiny, rng.randrange(10**6), batch=rng.randint(1, 200), length=length))

    shop.threads(talk, talk, encode)


def churn(shop: Shop) -> None:
    """Nine models, of 1 to 440 MB, loaded, run at random batch and length and closed; up to five at once."""
    from glake_infer.models import zoo

    models: list[Any] = [
        *(zoo.spec(name) for name in ("bert-base", "bert-small", "resnet50", "llama-125m")),
        zoo.spec("bert-small", layers=8, head="b", labels=9),
        "minilm-l6-int8", "ocr-common-old", "ppocr-rec", "silero-op15",
    ]  # fmt: skip
    rng = random.Random(3)
    loaded: dict[int, Any] = {}
    while shop.open:
        key = rng.randrange(len(models))
        if key not in loaded:
            loaded[key] = shop.session(models[key], pattern=rng.random() < 0.5)
        elif rng.random() < 0.5:
            del loaded[key]
            gc.collect()
        for _ in range(rng.randint(1, 4) if loaded else 0):
            chosen = rng.choice(list(loaded))
            model, session = models[chosen], loaded[chosen]
            if isinstance(model, str):
                run_real(model, session, rng)
                continue
            length = rng.choice([64, 96, 128]) if "resnet" in model.name else rng.randint(8, 96)
            session.run(None, zoo.feeds(model, rng.randrange(10**6), batch=rng.randint(1, 4), length=length))
        while len(loaded) > 5:
            del loaded[rng.choice(list(loaded))]
            gc.collect()


SCENES: dict[str, Callable[[Shop], None]] = {
    "encoders": encoders,
    "vision": vision,
    "decode": decode,
    "churn": churn,
}
