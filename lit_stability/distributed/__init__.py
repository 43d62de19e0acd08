"""Support for several ranks: overlapped collectives, and tensors sharded over ranks.

May import torch, and no other part of the package.
"""
