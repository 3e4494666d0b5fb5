"""Scenes on CUDA, whose traces `benchmarks.traces` records. Threads with their own sessions, so with their own streams.

Models of the zoo only: a machine with a GPU need not have a network. What runs on the host there anyway (int8,
speech detection, text lines) is in the scenes on the CPU.
"""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np

from benchmarks.scenes import Job, Shop
from glake_infer.models import zoo

PREFIX = 16  # tokens that a llama's cache holds from the beginning


def _encoder(shop: Shop, model: zoo.Spec, *, batch: int, length: int) -> Job:
    """Random batch and length, up to these."""
    session = shop.session(model)

    def job(rng: random.Random) -> None:
        shape = {"batch": rng.randint(1, batch), "length": rng.randint(16, length)}
        session.run(None, zoo.feeds(model, rng.randrange(10**6), **shape))

    return job


def _images(shop: Shop, model: zoo.Spec, *, batch: int) -> Job:
    """Random batch up to this one, and one of six sizes."""
    session = shop.session(model)

    def job(rng: random.Random) -> None:
        size = rng.choice([96, 128, 160, 192, 224, 256])
        session.run(None, {"pixel_values": np.full((rng.randint(1, batch), 3, size, size), 0.5, np.float32)})

    return job


def _talker(shop: Shop, model: zoo.Spec, *, batch: int, length: int, tokens: int) -> Job:
    """A prompt, then token by token; the caches stay on the device and grow."""
    session = shop.session(model)
    caches = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values")]

    def run(feeds: dict[str, Any], past: list[Any]) -> list[Any]:
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, value in zip(caches if past else [], past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, shop.kind, shop.index)
        session.run_with_iobinding(binding)
        found: list[Any] = binding.get_outputs()
        return found[1:]  # the first are the logits

    def job(rng: random.Random) -> None:
        rows, prompt = rng.randint(1, batch), rng.randint(16, length)
        feeds = zoo.feeds(model, rng.randrange(10**6), batch=rows, length=prompt, past=PREFIX)
        past = run(feeds, [])
        for done in range(PREFIX + prompt, PREFIX + prompt + rng.randint(8, tokens)):
            ids, mask = np.full((rows, 1), done), np.ones((rows, done + 1), np.int64)
            past = run({"input_ids": ids, "attention_mask": mask}, past)

    return job


def encoders(shop: Shop) -> None:
    """bert-base, two bert-small and bert-mini in four threads, random batch and length."""
    small = zoo.spec("bert-small"), zoo.spec("bert-small", layers=8, head="b", labels=9)
    jobs = (
        _encoder(shop, zoo.spec("bert-base"), batch=48, length=512),
        *(_encoder(shop, model, batch=64, length=512) for model in small),
        _encoder(shop, zoo.spec("bert-mini"), batch=128, length=512),
    )
    shop.start()
    shop.threads(*jobs)


def vision(shop: Shop) -> None:
    """resnet50, resnet34, resnet18 and bert-small in four threads, random batch and size."""
    jobs = (
        _images(shop, zoo.spec("resnet50"), batch=64),
        _images(shop, zoo.spec("resnet34"), batch=64),
        _images(shop, zoo.spec("resnet18"), batch=96),
        _encoder(shop, zoo.spec("bert-small"), batch=48, length=384),
    )
    shop.start()
    shop.threads(*jobs)


def decode(shop: Shop) -> None:
    """Two llama-125m and a llama-tiny with growing caches on the device in three threads, beside bert-small."""
    jobs = (
        _talker(shop, zoo.spec("llama-125m"), batch=16, length=256, tokens=48),
        _talker(shop, zoo.spec("llama-125m", seed=1), batch=4, length=512, tokens=96),
        _talker(shop, zoo.spec("llama-tiny"), batch=64, length=256, tokens=48),
        _encoder(shop, zoo.spec("bert-small"), batch=48, length=384),
    )
    shop.start()
    shop.threads(*jobs)


def churn(shop: Shop) -> None:
    """Eight models of 45 to 540 MB in two threads, loaded, run at random batch and length, closed; up to six at once."""
    models = [
        *(zoo.spec(name) for name in ("bert-base", "bert-small", "resnet50", "llama-125m", "resnet34")),
        zoo.spec("bert-base", layers=6, head="b", labels=9),
        zoo.spec("bert-small", layers=8, head="c", labels=3),
        zoo.spec("resnet18", labels=10),
    ]
    for model in models:
        shop.path(model)  # written before the time begins
    loaded: tuple[dict[int, Any], ...] = ({}, {})
    loaded[0][0] = shop.session(models[0])  # loads CUDA's libraries
    shop.start()

    def run(model: zoo.Spec, session: Any, rng: random.Random) -> None:
        if "resnet" in model.name:
            shape = {"batch": rng.randint(1, 24), "length": rng.choice([96, 128, 160, 192, 224])}
        else:
            shape = {"batch": rng.randint(1, 16), "length": rng.randint(8, 256)}
        session.run(None, zoo.feeds(model, rng.randrange(10**6), **shape))

    def job_of(mine: dict[int, Any]) -> Job:
        def job(rng: random.Random) -> None:
            key = rng.randrange(len(models))
            if key not in mine:
                if len(mine) == 3:
                    del mine[rng.choice(list(mine))]
                mine[key] = shop.session(models[key])
            elif rng.random() < 0.5:
                del mine[key]
            gc.collect()
            for _ in range(rng.randint(1, 6) if mine else 0):
                chosen = rng.choice(list(mine))
                run(models[chosen], mine[chosen], rng)

        return job

    shop.threads(*(job_of(mine) for mine in loaded))


SCENES = {"encoders": encoders, "vision": vision, "decode": decode, "churn": churn}
