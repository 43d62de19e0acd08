"""Training state that is saved and restored: snapshots, RNG states, checkpoints, LR factors.

May import torch, but not Lightning. This file imports neither.
"""
