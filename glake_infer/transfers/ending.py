"""Ending transfers before their time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from glake_infer.allocators.errors import ForkedProcessError

if TYPE_CHECKING:
    from glake_infer.allocators import _native
    from glake_infer.transfers.storage import StorageTransfer


def end_transfers(transfers: Sequence[_native.Transfer | StorageTransfer]) -> None:
    """Cancel them and wait until they have ended, whatever is raised meanwhile (Ctrl-C, other signals' handlers)."""
    while True:
        try:
            for transfer in transfers:
                transfer.cancel()
            for transfer in transfers:
                while not transfer.wait(1):
                    pass
            return
        except ForkedProcessError:
            raise
        except BaseException:
            continue
