"""Several ranks: collectives that overlap with computation, and tensors sharded over ranks.

May import torch; the lowest room, imports no other.
"""
