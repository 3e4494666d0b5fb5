"""How a process gets to a broker: it connects, starts one where there is none, and is welcomed."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from glake_infer.allocators.errors import BrokerError
from glake_infer.sharing import protocol
from glake_infer.sharing.channel import Channel, OtherVersionError, close_all
from glake_infer.sharing.refusals import BrokerGoneError, error_of

BLOCKED = 10.0
"""Seconds that sending, and the answer to Hello, may take."""

STARTING = 20.0
"""Seconds that a broker started on demand may take to answer."""

GRANDCHILD = """
import os, sys
if os.fork() == 0:
    try:
        with open("/proc/self/oom_score_adj") as score:
            above = int(score.read()) > 0
        if above:
            with open("/proc/self/oom_score_adj", "w") as score:
                score.write("0")
    except OSError:
        pass
    os.execv(sys.argv[1], sys.argv[1:])
"""
"""Starts a program that is no child of ours: some processes (Ray's workers) end with all their children. Nor is it among the
first to be killed when memory runs out, as such a process may be: others have their weights from it."""

IDLE_EXIT = 60
"""Seconds after which a broker that was started on demand ends, when it has no clients."""


def dial(socket: Path, *, starts: bool, given_up: Callable[[], bool]) -> Channel:
    """Connect to the broker at a socket; `starts`: where there is none, start one, unless that is given up.

    Raises BrokerGoneError.
    """
    try:
        return Channel.connect(socket, BLOCKED)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        if not starts:
            raise BrokerGoneError(
                f"there is no broker at {socket} ({error.strerror}). Start one (`glake-infer broker`), or say "
                "broker='auto'."
            ) from error
    except OSError as error:
        raise BrokerGoneError(f"the broker at {socket} cannot be reached: {error}.") from error
    return _start(socket, given_up)


def _start(socket: Path, given_up: Callable[[], bool]) -> Channel:
    """Start a broker, as others may do at this moment too: one of them gets the socket."""
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = socket.with_suffix(".log")
    command = [sys.executable, "-m", "glake_infer.cli", "broker", "--socket", str(socket)]
    command += ["--exit-when-idle", str(IDLE_EXIT)]
    alive, held = os.pipe2(os.O_CLOEXEC)  # its end says that the broker has ended
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    try:
        try:
            with journal.open("ab") as output:
                subprocess.run(
                    [sys.executable, "-S", "-c", GRANDCHILD, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=[held],
                    cwd="/",
                    check=False,
                )
        finally:
            os.close(held)
        until = time.monotonic() + STARTING
        while time.monotonic() < until and not given_up():
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return Channel.connect(socket, BLOCKED)
            if poll.poll(20) and not socket.exists():
                break
    finally:
        os.close(alive)
    raise BrokerGoneError(
        f"a broker was started and does not answer at {socket}. Its own words are in {journal}."
    )


def welcome(channel: Channel, number: int) -> protocol.Welcome:
    """The broker's answer to Hello `number`. Raises BrokerGoneError, and what it refuses with."""
    try:
        while (found := channel.receive()) is not None:
            message, descriptors = found
            close_all(descriptors)
            if isinstance(message, protocol.Refusal) and message.to in (0, number):
                raise error_of(message)
            if isinstance(message, protocol.Welcome):
                return message
    except OtherVersionError as error:
        raise BrokerError(str(error)) from error
    except OSError as error:
        raise BrokerGoneError(f"the broker does not answer: {error}") from error
    raise BrokerGoneError("the broker ended the connection.")
