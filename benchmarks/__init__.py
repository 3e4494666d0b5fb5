"""Benchmarks, each beside its twin (what a user would run instead) measured in the same run.

python -m benchmarks                 all of them
python -m benchmarks family int8     some
"""
