"""Ask brokers and processes what they hold. Whoever answers shows it to its own user, and root, alone."""

from __future__ import annotations

import os
import socket as sockets
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from glake_infer.allocators.errors import GlakeError
from glake_infer.sharing.channel import Channel, close_all, peer
from glake_infer.sharing.paths import default_socket
from glake_infer.sharing.protocol import (
    Answer,
    Done,
    Hello,
    Ping,
    Refusal,
    Request,
    Statement,
    Status,
    Welcome,
)
from glake_infer.sharing.status import DeviceStatus, MachineStatus
from glake_infer.version import __version__
from glake_infer.window.figures import ungoverned

PROCESS_SOCKETS = "process-*.sock"
"""The sockets of single processes, beside the broker's."""

WITHIN = 5.0
"""Seconds in which an answer is expected."""

A = TypeVar("A", bound=Answer)


class NobodyThereError(GlakeError):
    """Nobody answers: there is no socket, or whoever made it has ended (`left`)."""

    def __init__(self, message: str, *, left: bool = False) -> None:
        """Say where was looked."""
        self.left = left
        super().__init__(message)


def observe(socket: str | os.PathLike[str], timeout: float = WITHIN) -> MachineStatus:
    """Ask the broker, or the process, at `socket` for all that it can see.

    Raises NobodyThereError (no socket, or one that was left behind), and GlakeError for what else may be there: no
    socket, another user's, one of another version, or somebody who does not answer within `timeout` seconds.
    """
    path = Path(socket)
    channel, pid = _connect(path, timeout)
    try:
        hello = Hello(id=1, release=__version__, pid=os.getpid(), name="observer", device=None)
        _ask(channel, path, hello, Welcome)
        status = _ask(channel, path, Status(id=2), Statement).status
    except TimeoutError as error:
        raise _silent(path, timeout) from error
    except OSError as error:
        raise _ended(path) from error
    finally:
        channel.close()
    return status if status.broker or not pid else _with_pid(status, pid)


def _connect(path: Path, timeout: float) -> tuple[Channel, int]:
    """The connection, and the pid of who made the socket, as it is here."""
    made = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_CLOEXEC)
    try:
        made.settimeout(timeout)
        made.connect(os.fspath(path))
        pid, user, _ = peer(made)
        if os.getuid() not in (user, 0) and user != 0:
            raise GlakeError(f"{path} is of user {user}, not {os.getuid()}. Ask as that user, or as root.")
    except BaseException as error:
        made.close()
        raise _unreachable(path, error, timeout) if isinstance(error, OSError) else error from None
    return Channel(made), pid


def _ask(channel: Channel, path: Path, request: Request, wanted: type[A]) -> A:
    with suppress(BrokenPipeError, ConnectionResetError):  # what it said before it went is worth more
        channel.send(request)
    while (received := channel.receive()) is not None:
        message, descriptors = received
        close_all(descriptors)
        if isinstance(message, Ping):
            channel.send(Done(to=message.id))
        elif isinstance(message, Refusal):
            raise GlakeError(f"{path} refuses to answer: {message.message}")
        elif isinstance(message, wanted) and message.to == request.id:
            return message
    raise _ended(path)


def _with_pid(status: MachineStatus, pid: int) -> MachineStatus:
    """A process in another container has another number there than here."""
    devices = [
        device.model_copy(update={"processes": [p.model_copy(update={"pid": pid}) for p in device.processes]})
        for device in status.devices
    ]
    return status.model_copy(update={"devices": devices})


def _unreachable(path: Path, error: OSError, timeout: float) -> GlakeError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NobodyThereError(f"there is no socket {path}.")
    if isinstance(error, ConnectionRefusedError):
        with suppress(OSError):
            if not stat.S_ISSOCK(path.stat().st_mode):
                return GlakeError(f"{path} is no socket. Expected that of a broker, or of a process.")
        return NobodyThereError(f"{path} was left behind: whoever made it has ended.", left=True)
    if isinstance(error, TimeoutError | BlockingIOError):
        return _silent(path, timeout)
    if isinstance(error, PermissionError):
        return GlakeError(
            f"{path} cannot be opened: it belongs to another user. Ask as that user, or as root."
        )
    return GlakeError(f"{path} cannot be opened: {error.strerror or error}.")


def _silent(path: Path, timeout: float) -> GlakeError:
    return GlakeError(
        f"{path} does not answer within {timeout:g} s: its process is stopped, or very busy. Try again, or look at it "
        "with `ps`."
    )


def _ended(path: Path) -> GlakeError:
    return GlakeError(f"{path} ended the conversation without an answer: its process is ending. Try again.")


def broker_socket(socket: str | os.PathLike[str] | None = None) -> Path:
    """The broker's socket: the one given, else $GLAKE_BROKER if that is a path, else the default one."""
    if socket is not None:
        return Path(socket)
    named = os.environ.get("GLAKE_BROKER", "")
    return Path(named) if os.sep in named else default_socket()


def sources(socket: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where somebody may answer: the broker's socket, whether it is there or not, and those of single processes.

    Of processes those beside the broker's socket and, where none is given, beside the default one. If `socket` is that
    of a process, it alone.
    """
    broker = broker_socket(socket)
    if broker.match(PROCESS_SOCKETS):
        return [broker]
    folders = [broker.parent] if socket is not None else [broker.parent, default_socket().parent]
    found = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob(PROCESS_SOCKETS))]
    return [broker, *found]


@dataclass(frozen=True)
class Watched:
    """What several sources show together."""

    status: MachineStatus
    answered: tuple[Path, ...]
    problems: tuple[str, ...]
    """What kept others from answering, a sentence each."""


def watch(socket: str | os.PathLike[str] | None = None, timeout: float = WITHIN) -> Watched:
    """Ask all `sources` at once, and merge what they answer.

    Sockets that processes left behind when they were killed are removed. Raises NobodyThereError where nobody answers,
    saying how to be seen; and what kept the only one that is there from answering.
    """
    places = sources(socket)
    answers = _ask_all(places, timeout)
    found = [(path, a) for path, a in zip(places, answers, strict=True) if isinstance(a, MachineStatus)]
    errors = [a for a in answers if isinstance(a, GlakeError) and not isinstance(a, NobodyThereError)]
    if not found:
        raise errors[0] if errors else _nobody(places[0], socket)
    return Watched(
        merge([status for _, status in found]), tuple(path for path, _ in found), tuple(map(str, errors))
    )


def _ask_all(places: Sequence[Path], timeout: float) -> list[MachineStatus | GlakeError]:
    answers: dict[Path, MachineStatus | GlakeError] = {}
    threads = [  # no pool of threads: that would keep a program from ending while somebody does not answer
        threading.Thread(target=lambda path=path: answers.update({path: _try(path, timeout)}), daemon=True)
        for path in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * timeout)
    return [answers.get(path, _silent(path, timeout)) for path in places]


def _try(path: Path, timeout: float) -> MachineStatus | GlakeError:
    try:
        return observe(path, timeout)
    except NobodyThereError as error:
        if error.left and path.match(PROCESS_SOCKETS):
            with suppress(OSError):
                path.unlink()
        return error
    except GlakeError as error:
        return error


def _nobody(broker: Path, socket: str | os.PathLike[str] | None) -> NobodyThereError:
    if broker.match(PROCESS_SOCKETS):
        return NobodyThereError(f"nobody answers at {broker}: the process has ended.")
    option = f" --socket {broker}" if socket is not None else ""
    return NobodyThereError(
        f"nobody answers: there is no broker at {broker}, and no process shows itself in {broker.parent}. Start "
        f"`glake-infer broker{option}`, or set GLAKE_MONITOR=1 in the environment of processes that load models "
        "(or call gi.monitor() in them)."
    )


def merge(statuses: Sequence[MachineStatus]) -> MachineStatus:
    """One of several; at least one. What a broker says of a device and of a process goes before what others say."""
    ordered = sorted(statuses, key=lambda status: status.broker is None)
    devices: dict[str, DeviceStatus] = {}
    for status in ordered:
        for device in status.devices:
            known = devices.get(device.name)
            devices[device.name] = _together(known, device) if known else device
    return MachineStatus(
        time=min(status.time for status in ordered), broker=ordered[0].broker, devices=list(devices.values())
    )


def _together(first: DeviceStatus, second: DeviceStatus) -> DeviceStatus:
    known = {process.pid for process in first.processes}
    new = [process for process in second.processes if process.pid not in known]
    processes = [*first.processes, *new]
    if not new:
        return first
    if first.governed:
        return first.model_copy(update={"processes": processes})
    return ungoverned(first.name, first.title, first.memory, processes)
