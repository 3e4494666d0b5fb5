"""What loading, waking and the links cost here, beside what a user would run instead.

made.py       models of a wanted size, made quickly
subjects.py   what is measured: a package, the same as an ordinary ONNX model, the same as safetensors
files.py      files in the page cache, and out of it
processes.py  a process of its own for every side
child.py      such a process
load.py       from a package's files to a session that has answered
resume.py     waking, beside raw copies
links.py      the rates of copies by size and paths

Every side runs in a process of its own; figures are medians.
"""
