"""`python -m glake_infer.cli` is `glake-infer`."""

from glake_infer.cli import main

main()
