"""One copy of every weight per machine: a broker that holds it, and the processes that map it.

Both sides
    protocol.py     the messages, and what each of them means
    channel.py      messages and file descriptors over a Unix socket
    descriptors.py  file descriptors of memory: who closes them, how many there may be
    status.py       what can be seen of it all: processes, models, memory
    paths.py        where the socket lies, and whether that place is safe

A process
    address.py      which broker it belongs to
    dialing.py      how it gets there, and starts one
    client.py       its connection, its recovery, and what the broker asks of it
    share.py        how its chunks come from the broker
    refusals.py     what it sees of a broker that refuses or is gone, as errors

The broker
    broker.py       the socket, and the loop
    connection.py   one connection
    service.py      the answer to every request
    table.py        what it knows of one device: regions, chunks, who has them, the budget (entries.py: what is in it)
    room.py         what goes first when memory is to hold something else
    turns.py        who may make room now
    checks.py       weights against their digests
    describe.py     what it says of a device
    limits.py       its limits as a user says them
"""
