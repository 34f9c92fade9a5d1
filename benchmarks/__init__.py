"""Measures wsgi-loop beside other ways to run async code under Django: `python -m benchmarks`."""
