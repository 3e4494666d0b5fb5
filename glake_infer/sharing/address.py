"""Which broker a process belongs to, and how its devices are called there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glake_infer import cuda
from glake_infer.allocators.devices import cpu_memory, parse_device
from glake_infer.allocators.errors import InputError
from glake_infer.sharing.paths import check_socket, default_socket, make_folder
from glake_infer.sharing.protocol import Device
from glake_infer.sharing.share import Share

if TYPE_CHECKING:
    from glake_infer.allocators import _native

VARIABLE = "GLAKE_BROKER"
"""What is meant where no broker is named: as the argument, or "off"."""


@dataclass(frozen=True)
class BrokerAddress:
    """A broker's socket, and whether a broker is started where there is none."""

    socket: Path
    starts: bool


def address_of(broker: str | os.PathLike[str] | None) -> BrokerAddress | None:
    """Read a `broker` argument: "auto", "off", a path, or None for $GLAKE_BROKER.

    Raises InputError, and GlakeError where the socket's folder is not this user's alone.
    """
    asked = os.environ.get(VARIABLE, "") if broker is None else os.fspath(broker)
    if asked in ("", "off"):
        if broker == "":
            raise InputError("broker='': expected 'auto', 'off', or the path of a broker's socket.")
        return None
    if asked == "auto":
        socket = default_socket()
        make_folder(socket.parent)
        return BrokerAddress(check_socket(socket), starts=True)
    return BrokerAddress(check_socket(asked), starts=False)


def share_for(native: _native.Pool, device: str, address: BrokerAddress) -> Share:
    """Connect the native pool of a device. Raises GlakeError."""
    return Share(
        native, device_named(device, native.granularity), device, address.socket, starts=address.starts
    )


def device_named(device: str, granule: int) -> Device:
    """A device as all processes call it. Raises DriverError."""
    from glake_infer.allocators import _native

    name = parse_device(device)
    if name == "cpu":
        return Device(name="cpu", title="host memory", memory=cpu_memory(), granule=granule)
    index = int(name.partition(":")[2])
    title, memory = _native.cuda_device_name(index), _native.device_memory(name)
    return Device(name=f"GPU-{cuda.uuid(index)}", title=title, memory=memory, granule=granule)
