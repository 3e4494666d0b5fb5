"""Where a broker's socket lies, and whether that place is safe: only this user may write there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from glake_infer.allocators.errors import GlakeError, InputError

LONGEST = 107
"""Bytes of a Unix socket's path that the system takes (sun_path, less its last zero)."""


def default_socket() -> Path:
    """The socket of this user's broker: in $XDG_RUNTIME_DIR, else in a folder of the user's own in /tmp."""
    if (runtime := os.environ.get("XDG_RUNTIME_DIR")) and Path(runtime).is_dir():
        return Path(runtime, "glake-infer", "broker.sock")
    return Path("/tmp", f"glake-infer-{os.getuid()}", "broker.sock")


def check_socket(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path, if a socket may be there or come there and nobody else can have put it there.

    Raises InputError (too long for a socket), GlakeError (the folder is missing or others can write to it, or there is
    another kind of file). Nothing is made.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100  links are left as they are
    if len(encoded := os.fsencode(path)) > LONGEST:
        raise InputError(
            f"{path} cannot be a socket: its name has {len(encoded)} bytes, and the system takes {LONGEST}. "
            "Choose a shorter one with --socket or $GLAKE_BROKER."
        )
    check_folder(path.parent)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise GlakeError(
                f"{path} is another kind of file, not a socket. Remove it, or choose another path."
            )
    return path


def check_folder(folder: Path) -> None:
    """Raise GlakeError unless the folder is there, this user's, and nobody else can write to it."""
    try:
        found = [folder.lstat()]
        if stat.S_ISLNK(found[0].st_mode):
            found.append(folder.stat())
    except OSError as error:
        raise GlakeError(
            f"the folder {folder} of the broker's socket cannot be used: {error.strerror}. Start a broker there, or "
            "choose another path."
        ) from error
    if not stat.S_ISDIR(found[-1].st_mode):
        raise GlakeError(f"{folder} is no folder, so no socket can be in it. Choose another path.")
    for status in found:
        if status.st_uid not in (os.getuid(), 0):
            raise GlakeError(
                f"the folder {folder} belongs to user {status.st_uid}, not to {os.getuid()}: a socket in it may be "
                "anybody's. Choose a path in a folder of your own."
            )
    if found[-1].st_mode & 0o022:
        raise GlakeError(
            f"others may write to the folder {folder} (mode {stat.S_IMODE(found[-1].st_mode):04o}): a socket in it may "
            f"be anybody's. Expected 0700: chmod 700 {folder}, or choose another path."
        )


def make_folder(folder: Path) -> None:
    """Make the socket's folder with what is above it, for this user alone. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)


class Claim:
    """The right to be the broker at a socket: a lock on a file beside it, which lasts as long as its holder.

    The file stays when the right ends, as removing it could take it from under the next one.
    """

    def __init__(self, path: Path) -> None:
        """Take it. Raises GlakeError with the pid of who has it; OSError."""
        self.file = path.with_name(f"{path.name}.lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            self._fd = os.open(self.file, flags, 0o600)
            try:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid = os.pread(self._fd, 20, 0).decode(errors="replace").strip()
                    raise GlakeError(
                        f"another broker{f' (process {pid})' if pid else ''} serves {path}, and there is one at a socket. "
                        "Use it, end it first, or choose another path with --socket."
                    ) from None
                if self._is_there():
                    os.ftruncate(self._fd, 0)
                    os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)  # somebody removed the file between: it locks nothing

    def _is_there(self) -> bool:
        try:
            there = self.file.lstat()
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def close(self) -> None:
        """Give it back."""
        os.close(self._fd)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, which only this user can connect to; whoever calls has the claim.

    What an earlier broker left there is removed. Raises GlakeError where somebody else answers there, OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(os.fspath(path))
                    answered = True
                except BlockingIOError:  # its queue is full
                    answered = True
                except OSError:
                    answered = False
            if answered:
                raise GlakeError(
                    f"another program listens at {path}, which is no broker of this version. End it, or choose another "
                    "path with --socket."
                )
            path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(made.fileno(), 0o600)  # the file gets this mode, less the umask
        made.bind(os.fspath(path))
        path.chmod(0o600)
        made.listen(128)
    except BaseException:
        made.close()
        raise
    return made
