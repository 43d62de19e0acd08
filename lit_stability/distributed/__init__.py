"""Support for several ranks: overlapped collectives, tensors sharded over ranks, and heartbeats.

May import torch, and no other part of the package.
"""
