"""Benchmarks: a model for lmms-eval, runs of it, their data, and one report. `vidlada eval` runs them."""
