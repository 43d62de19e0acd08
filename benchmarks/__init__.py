"""Benchmarks of the suite: its cost, and how many faulty runs it rescues."""
