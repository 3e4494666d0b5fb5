"""One copy of every weight per machine: a broker that holds it, and the processes that map it.

protocol.py   the messages, and what each of them means
status.py     what can be seen of it all: processes, models, memory
channel.py    messages and file descriptors over a Unix socket
table.py      what the broker knows of one device: regions, chunks, who has them, the budget
broker.py     the broker itself: connections, checks of weights, room for who needs it
client.py     a process's connection, its recovery, and what the broker asks of a process
"""
