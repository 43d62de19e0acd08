"""Checks that run beside training: before step 1, on a checkpoint, on the range of the numbers.

May import torch. This file imports nothing.
"""
