"""Turns: one at a time makes room on a device, in the order of asking; private memory before weights.

Who asks for private memory is in the middle of a run as a rule, and others may be waiting for the end of that run. Who
asks for weights is at the beginning of one: it can be told to begin again, and then what it has in use is free for others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

from glake_infer.sharing.entries import Client


class GiveWayError(Exception):
    """Others asked before, and wait for what this one has in use: it begins again, behind them."""


@dataclass(eq=False, repr=False)
class Turn:
    """A place in the line."""

    client: Client
    urgent: bool
    number: int
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def order(self) -> tuple[bool, int]:
        """What the line is ordered by."""
        return not self.urgent, self.number


class Turns:
    """The line of one device."""

    def __init__(self) -> None:
        """Nobody is in it."""
        self._holder: Turn | None = None
        self._line: list[Turn] = []
        self._numbers = itertools.count()

    @property
    def crowded(self) -> bool:
        """Whether somebody has the turn, or waits for it."""
        return self._holder is not None

    @contextlib.asynccontextmanager
    async def turn(self, client: Client, *, urgent: bool = False) -> AsyncIterator[Turn]:
        """Have the turn for the block. Raises GiveWayError, at the beginning or from `step_aside`."""
        turn = Turn(client, urgent, next(self._numbers))
        await self._line_up(turn)
        try:
            yield turn
        finally:
            self._leave(turn)

    async def step_aside(self, turn: Turn) -> bool:
        """Let those go first who are urgent; whether there were any."""
        if turn.urgent or not any(other.urgent for other in self._line):
            return False
        turn.ready = asyncio.get_running_loop().create_future()
        self._leave(turn, into_line=True)
        await self._wait(turn)
        return True

    def waiting(self) -> set[Client]:
        """Whose requests are in the line."""
        return {turn.client for turn in self._line}

    def urgent(self, client: Client) -> int:
        """How many urgent requests of a client are here."""
        turns = [self._holder, *self._line]
        return sum(turn is not None and turn.urgent and turn.client is client for turn in turns)

    def send_back(self, clients: Collection[Client]) -> bool:
        """Let the last in the line of these clients give way, unless it is urgent; whether there was one."""
        for turn in reversed(self._line):
            if turn.client in clients and not turn.urgent and not turn.ready.done():
                self._line.remove(turn)
                turn.ready.set_exception(GiveWayError())
                return True
        return False

    async def _line_up(self, turn: Turn) -> None:
        if self._holder is None:
            self._holder = turn
            return
        self._line.append(turn)
        self._line.sort(key=lambda each: each.order)
        await self._wait(turn)

    async def _wait(self, turn: Turn) -> None:
        try:
            await turn.ready
        except BaseException:  # cancelled, perhaps with the turn in its hands already
            if turn in self._line:
                self._line.remove(turn)
            self._leave(turn)
            raise

    def _leave(self, turn: Turn, *, into_line: bool = False) -> None:
        if self._holder is not turn:
            return
        self._holder = None
        if into_line:
            self._line.append(turn)
            self._line.sort(key=lambda each: each.order)
        while self._line and not self._holder:
            first = self._line.pop(0)
            if not first.ready.done():  # else it was cancelled, and does not know yet
                self._holder = first
                first.ready.set_result(None)
