"""Room for who needs it: what goes first when the memory of a device is to hold something else.

(a) Chunks that nobody has, the longest unused first. (b) Idle private memory of clients, of whom has most of it first.
(c) Chunks that all of their holders could do without: a chunk counts as its most important user's, and of these models that
sleep go before models that are idle, lower priorities before higher ones, and then whoever was idle longest. Nothing goes
where that would not be enough, unless models are busy: then what can go goes, and the rest is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from glake_infer.sharing import protocol
from glake_infer.sharing.connection import Connection
from glake_infer.sharing.entries import Chunk, Client
from glake_infer.sharing.table import Table
from glake_infer.sharing.turns import Turn, Turns

STUCK = 0.3
"""Seconds without any change after which it is asked whether all wait for each other."""

HOPELESS = 0.1
"""Seconds for which nobody is busy, and not enough could go, after which that is true: one may have been given a chunk just
now, and have it in use in a moment."""

POLL = 0.02
"""Seconds after which busy clients are asked again."""

Rank = tuple[bool, int, float]
"""Of a chunk's user: the lowest goes first."""


@dataclass
class Went:
    """What went so that there is room."""

    chunks: int = 0
    """Whose memory was given back."""
    chunk_bytes: int = 0
    private_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.chunk_bytes + self.private_bytes


@dataclass(frozen=True)
class _Taken:
    """What is to be asked of a chunk's holders."""

    rank: Rank
    token: str
    size: int
    chunk: Chunk | None
    """None for what one client keeps for itself."""
    connections: tuple[Connection, ...]


class Room:
    """Makes room on one device: for one at a time."""

    def __init__(self, table: Table, patience: float) -> None:
        """`patience`: seconds that others' work is waited for."""
        self.table = table
        self.turns = Turns()
        self.connections: dict[Client, Connection] = {}
        self._patience = patience

    async def make(
        self,
        turn: Turn,
        missing: Callable[[Went], int],
        keep: Callable[[], Collection[Chunk]],
        spare: Client | None = None,
    ) -> Went:
        """Let go of what it takes until `missing` says 0, or nothing more can go; whoever calls has the turn.

        `missing` is told what went so far. Chunks to `keep` do not go, nor private memory of the client to `spare`. Raises
        GiveWayError.
        """
        went = Went()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience
        seen: object = None
        since = 0.0
        while (left := missing(went)) > 0:
            unused = self.table.oldest_unused(keep())
            if sum(chunk.size for chunk in unused) >= left:
                self._evict(unused, went, missing)
                continue
            offers = await self._offers()
            left = missing(went)
            unused = self.table.oldest_unused(keep())
            taken = self._candidates(offers, keep())
            idle = {client: offer.idle for client, offer in offers.items() if client is not spare}
            busy = {client for client, offer in offers.items() if self._is_busy(client, offer, turn.client)}
            there = sum(c.size for c in unused) + sum(t.size for t in taken) + sum(idle.values())
            before = self._state(went)
            if there >= left or busy:
                self._evict(unused, went, missing)
                if (left := missing(went)) > 0:
                    await self._trim(idle, left, went)
                if (left := missing(went)) > 0:
                    await self._take(taken, left, went, missing)
            if missing(went) <= 0:
                break
            if loop.time() >= until:
                break
            if self._state(went) != before or await self.turns.step_aside(turn):
                seen = None
                continue
            if (now := (busy, idle, len(taken), self._state(went))) != seen:
                seen, since = now, loop.time()
            elif not busy and loop.time() - since >= HOPELESS:
                break
            elif busy and loop.time() - since >= STUCK:
                seen = None
                if not self._untie(turn.client, busy, offers, keep()):
                    break
            await asyncio.sleep(POLL)
        return went

    def _untie(
        self,
        client: Client,
        busy: set[Client],
        offers: dict[Client, protocol.Offers],
        keep: Collection[Chunk],
    ) -> bool:
        """Whether waiting makes sense: all who are busy may be so because they wait themselves, behind `client`.

        Then one of them begins again, whose memory is of use then; or all, if only together they can let go of some.
        """
        others = (busy - {client}) or {client}
        if not others <= self.turns.waiting():
            return True
        offered = {each: {offer.chunk for offer in offers[each].chunks} for each in offers}

        def is_of_use(each: Client) -> bool:
            return any(
                chunk.ready
                and chunk not in keep
                and all(h is each or chunk.token in offered.get(h, ()) for h in chunk.holders)
                for chunk in each.has
            )

        if useful := {each for each in others if is_of_use(each)}:
            return self.turns.send_back(useful)
        return sum(self.turns.send_back({each}) for each in others) > 0

    def _is_busy(self, client: Client, offer: protocol.Offers, asker: Client) -> bool:
        """Whether it makes chunks, or they are being checked, or it uses some: they can go in a moment.

        Not where all that goes on in it waits for this very request.
        """
        if client.makes or any(chunk.checking for chunk in client.has):
            return True
        only_asks = client is asker and offer.running <= self.turns.urgent(client)
        return bool(offer.busy) and (not only_asks or client in self.turns.waiting())

    def _state(self, went: Went) -> tuple[int, ...]:
        """What differs where going on may help: what went, who has ended, what nobody has now."""
        return went.bytes, len(self.connections), self.table.unused

    def _evict(self, chunks: Iterable[Chunk], went: Went, missing: Callable[[Went], int]) -> None:
        """(a) Let go of chunks that nobody has, as many as it takes."""
        for chunk in chunks:
            if missing(went) <= 0:
                return
            if self.table.evict(chunk):
                went.chunks += 1
                went.chunk_bytes += chunk.size

    async def _offers(self) -> dict[Client, protocol.Offers]:
        """What each client could do without."""
        connections = list(self.connections.items())  # asking may end one
        asked = {client: each.ask(protocol.Offer(), protocol.Offers) for client, each in connections}
        if asked:
            await asyncio.wait(asked.values())
        found = {client: future.result() for client, future in asked.items()}
        return {client: offers for client, offers in found.items() if offers is not None}

    async def _trim(self, idle: dict[Client, int], left: int, went: Went) -> None:
        """(b) Ask for private memory that is idle."""
        asked = []
        for client, most in sorted(idle.items(), key=lambda each: -each[1]):
            connection = self.connections.get(client)
            if left <= 0 or not most or connection is None:
                continue

            def granted(answer: protocol.Granted, client: Client = client) -> None:
                went.private_bytes += self.table.shrink(client, answer.quota)

            size = min(most, left)
            left -= size
            connection.trimming = connection.ask(protocol.Trim(bytes=size), protocol.Granted, granted)
            asked.append(connection.trimming)
        if asked:
            await asyncio.wait(asked)

    def _candidates(self, offers: dict[Client, protocol.Offers], keep: Collection[Chunk]) -> list[_Taken]:
        """Chunks that all of their holders offer, the least important first."""
        ranks: dict[Client, dict[str, Rank]] = {
            client: {each.chunk: (each.awake, each.priority, -each.idle_seconds) for each in offer.chunks}
            for client, offer in offers.items()
        }
        found: dict[str, _Taken] = {}
        for client, mine in ranks.items():
            if client not in self.connections:  # it has ended meanwhile
                continue
            for token, size in client.strays.items():
                if token in mine:
                    found[f"{client.pid} {token}"] = _Taken(
                        mine[token], token, size, None, (self.connections[client],)
                    )
            for chunk in client.has:
                holders = chunk.holders
                if chunk.token in found or not chunk.ready or chunk in keep:
                    continue
                if all(chunk.token in ranks.get(holder, ()) for holder in holders):
                    rank = max(ranks[holder][chunk.token] for holder in holders)
                    connections = tuple(self.connections[holder] for holder in holders)
                    found[chunk.token] = _Taken(rank, chunk.token, chunk.size, chunk, connections)
        return sorted(found.values(), key=lambda each: (each.rank, each.token))

    async def _take(
        self, candidates: list[_Taken], left: int, went: Went, missing: Callable[[Went], int]
    ) -> None:
        """(c) Ask for chunks."""
        chosen: list[_Taken] = []
        wanted: dict[Connection, list[str]] = {}
        for each in candidates:
            if left <= 0:
                break
            left -= each.size
            chosen.append(each)
            for connection in each.connections:
                wanted.setdefault(connection, []).append(each.token)
        asked = []
        for connection, tokens in wanted.items():
            if (client := connection.client) is None:
                continue

            def given(answer: protocol.Given, client: Client = client) -> None:
                before = sum(client.strays.values())
                self.table.given(client, answer.chunks)
                went.private_bytes += before - sum(client.strays.values())

            asked.append(connection.ask(protocol.Give(chunks=tokens), protocol.Given, given))
        if asked:
            await asyncio.wait(asked)
        self._evict((each.chunk for each in chosen if each.chunk), went, missing)
