"""Benchmarks: run by hand, they print what they measured and promise nothing."""
