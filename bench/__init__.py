"""Benchmarks. `python -m bench --help` lists the commands; the results are in bench/results."""
