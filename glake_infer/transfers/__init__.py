"""Bytes between files, host memory and devices, over every link there is.

device.py      what a residency asks for: load files, keep copies, bring them back
settings.py    how many readers and paths, how much memory in flight
paths.py       which links a GPU has, what they reach, and the figures that are kept on disk
relays.py      peers' links in use, and their buffers, which come from the peers' pools
host_cache.py  the budget of page-locked copies
ending.py      how a transfer is ended before its time
storage.py     files straight to a GPU, where GPUDirect Storage is installed
timeline.py    who did what when, as a Chrome trace

The engine itself is native: allocators/transfer_engine.hpp.
"""
