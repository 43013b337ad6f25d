"""Benchmarks: time, quality, bytes and served speed, ours beside what others have."""
