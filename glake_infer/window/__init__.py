"""The window: what can be seen of the memory of a machine's processes.

A process shows itself (monitor.py), a broker shows all its clients; observe.py asks them. What they answer, a
MachineStatus (glake_infer/sharing/status.py), becomes Prometheus metrics (metrics.py), a page of HTML (report.py), or
`glake-infer top`. figures.py has the sums that all of these show.
"""
