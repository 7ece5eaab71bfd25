"""Benchmarks: what eviction costs, as ratios to what it replaces, measured side by side."""
