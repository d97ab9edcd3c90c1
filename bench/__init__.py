"""Measurements: each module is one, run as ``python -m bench.NAME``, its last line JSON."""
