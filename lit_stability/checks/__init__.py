"""Checks outside of training: before step 1, of a checkpoint, of the range of magnitudes.

Files may import torch. This file imports nothing.
"""
