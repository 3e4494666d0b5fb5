"""Turns: one at a time, private memory first, and nobody is forgotten."""

import asyncio
import random

import pytest

from glake_infer.sharing.entries import Client
from glake_infer.sharing.turns import GiveWayError, Turns


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Line:
    """Clients that take turns, and what happened."""

    def __init__(self):
        self.turns = Turns()
        self.story = []

    def start(self, name, urgent=False, steps=None):
        client = Client(name, 1)

        async def work():
            try:
                async with self.turns.turn(client, urgent=urgent) as turn:
                    self.story.append(name)
                    if steps:
                        await steps(turn)
                    self.story.append(f"{name} ends")
            except GiveWayError:
                self.story.append(f"{name} gives way")

        task = asyncio.create_task(work())
        task.client = client
        return task


def test_in_the_order_of_asking_private_memory_first():
    async def work():
        line = Line()
        go = asyncio.Event()
        tasks = [line.start("a", steps=lambda turn: go.wait())]
        await settle()
        tasks += [
            line.start("b"),
            line.start("c", urgent=True),
            line.start("d"),
            line.start("e", urgent=True),
        ]
        await settle()
        assert line.turns.crowded
        assert {client.name for client in line.turns.waiting()} == {"b", "c", "d", "e"}
        go.set()
        await asyncio.gather(*tasks)
        assert [each for each in line.story if "ends" not in each] == ["a", "c", "e", "b", "d"]
        assert not line.turns.crowded

    run(work())


def test_stepping_aside_lets_the_urgent_first_and_nobody_else():
    async def work():
        line = Line()
        go = asyncio.Event()

        async def steps(turn):
            assert not await line.turns.step_aside(turn)  # nobody is urgent
            await go.wait()
            assert await line.turns.step_aside(turn)
            assert not await line.turns.step_aside(turn)

        tasks = [line.start("a", steps=steps)]
        await settle()
        tasks += [line.start("b"), line.start("c", urgent=True)]
        await settle()
        go.set()
        await asyncio.gather(*tasks)
        assert line.story == ["a", "c", "c ends", "a ends", "b", "b ends"]

    run(work())


def test_the_last_of_some_gives_way():
    async def work():
        line = Line()
        go = asyncio.Event()
        a = line.start("a", steps=lambda turn: go.wait())
        await settle()
        b, c, d = line.start("b"), line.start("c"), line.start("d", urgent=True)
        await settle()
        assert not line.turns.send_back({a.client, d.client})  # it has the turn; it is urgent
        assert line.turns.send_back({b.client, c.client, d.client})
        await settle()
        assert line.story == ["a", "c gives way"]
        assert line.turns.send_back({b.client, c.client, d.client})
        assert not line.turns.send_back({b.client, c.client, d.client})
        go.set()
        await asyncio.gather(a, b, c, d)
        assert line.story == ["a", "c gives way", "b gives way", "a ends", "d", "d ends"]
        assert not line.turns.crowded

    run(work())


@pytest.mark.parametrize("when", ["waiting", "with the turn", "as it gets the turn", "both at once"])
def test_who_is_cancelled_passes_the_turn_on(when):
    async def work():
        line = Line()
        go = asyncio.Event()
        a = line.start("a", steps=lambda turn: go.wait())
        await settle()
        b, c = line.start("b"), line.start("c")
        await settle()
        if when == "waiting":
            b.cancel()
            go.set()
        elif when == "with the turn":
            a.cancel()
        elif when == "as it gets the turn":
            go.set()
            await asyncio.sleep(0)
            b.cancel()
        else:
            a.cancel()
            b.cancel()
        await asyncio.gather(a, b, c, return_exceptions=True)
        assert line.story[-1] == "c ends"
        assert not line.turns.crowded

    run(work())


@pytest.mark.parametrize("seed", range(30))
def test_any_story_ends_with_nobody_in_the_line(seed):
    async def work():
        rng = random.Random(seed)
        line = Line()
        inside = 0

        async def steps(turn):
            nonlocal inside
            for _ in range(rng.randrange(4)):
                inside += 1
                try:
                    assert inside == 1
                    for _ in range(rng.randrange(3)):
                        await asyncio.sleep(0)
                finally:
                    inside -= 1
                await line.turns.step_aside(turn)

        tasks = []
        for number in range(200):
            tasks.append(line.start(f"{number}", rng.random() < 0.3, steps))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.2:
                line.turns.send_back({task.client for task in rng.sample(tasks, min(3, len(tasks)))})
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [each for each in done if each and not isinstance(each, asyncio.CancelledError)]
        assert not line.turns.crowded
        assert not line.turns.waiting()

    run(work())
