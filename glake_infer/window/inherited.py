"""Listening sockets that a child of fork() must not keep open: it would answer nobody, and whoever asks would wait."""

from __future__ import annotations

import os
import socket
import weakref

_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(listener: socket.socket) -> None:
    """Close this process's copy of a listening socket in every child that it forks."""
    _listening.add(listener)


def _close() -> None:
    for listener in list(_listening):
        listener.close()
    _listening.clear()


os.register_at_fork(after_in_child=_close)
