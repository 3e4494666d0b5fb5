"""Pool: the pool of a device, with its weights in a broker's memory if that is wanted."""

from __future__ import annotations

import os
from typing import Literal

from glake_infer.allocators.errors import InputError
from glake_infer.allocators.pool import Pool as DevicePool
from glake_infer.residency import Residency
from glake_infer.sharing.address import address_of
from glake_infer.transfers.device import CudaTransfers


class Pool(DevicePool):
    """One device's memory for every session of this process that is attached to it.

    A process has one pool per device. This object is its handle: it sets the limit, and when it is closed or dropped the
    idle memory goes back to the system. Sessions that are still alive then keep their memory and go on working; the next
    handle on the device takes the same pool over.

    Thread-safe. A child of fork() cannot use it (`ForkedProcessError`), nor sessions that are on it.

    Args:
        device: "cpu", "cuda:N", or "cuda" for "cuda:0"; N as CUDA counts in this process (CUDA_VISIBLE_DEVICES).
        limit: a hard bound on the memory that the pool holds, idle memory and mapped weights
            included: bytes, or text such as "4GiB". None: all memory of the machine, or of its
            control group if that is less; on CUDA all memory of the device.
        debug: find wrong accesses, much slower (docs/debugging.md). True: large allocations lie between unmapped
            guards, small ones between canaries that are checked at every free. "guard": every allocation lies
            between guards.
        wipe: set memory to zero when it is freed, for tenants that must not see each other's data.
        broker: put weights into the memory of this broker, where all processes of this user that name the same one share
            them (docs/broker.md): the path of its socket; "auto" for the default socket, with a broker started on
            demand; "off" for none. None: what $GLAKE_BROKER says, else none. The broker's limit then bounds this pool
            too: it grows while the broker has room, and gives idle memory back when other processes need it.

    Raises:
        PoolExistsError: the device has a pool with a live handle.
        PoolInUseError: sessions of an earlier handle hold more than `limit`, or hold anything and `debug` differs.
        DeviceNotFoundError: no such device.
        InputError: not a limit, or more than the memory of the CUDA device; a broker for a pool in debug mode.
        DriverError: the device could not be opened.
        ForkedProcessError: the parent process has a pool.
        GlakeError: there is no broker at the socket, it does not answer, or it is another user's or version's.
    """

    def __init__(
        self,
        device: str = "cpu",
        limit: int | str | None = None,
        debug: bool | Literal["guard"] = False,
        wipe: bool = False,
        *,
        broker: str | os.PathLike[str] | None = None,
        _ignore_streams: bool = False,
    ) -> None:
        address = address_of(broker)
        if address and debug:
            raise InputError(
                f"a pool in debug mode cannot have its weights at the broker {address.socket}: leave out debug, or say "
                "broker='off'."
            )
        super().__init__(device, limit, debug, wipe, _ignore_streams)
        if address:
            try:
                Residency.of(self, broker=address)
            except BaseException:
                super().close()
                raise

    def trim(self, target: int | str = 0) -> int:
        """Give idle memory back to the system, until at most `target` bytes are reserved or none is idle.

        Returns the bytes given back. Memory that is active is never touched, nor what other processes have of a broker's.
        """
        freed = super().trim(target)
        Residency.of(self).flush()
        return freed

    def close(self) -> None:
        """Give idle memory back, end this handle, and leave the broker. Closing twice is fine.

        Raises `PoolInUseError`, with the handle still open, while memory is handed out.
        """
        Residency.settle(self)
        CudaTransfers.leave(self.device)
        super().close()
        Residency.leave(self)
