"""What is saved of a run and restored: snapshots, generators, checkpoints on disk, factors.

May import torch; knows no Lightning. This file imports neither.
"""
