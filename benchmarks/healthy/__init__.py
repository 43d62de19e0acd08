"""Healthy training practices of many kinds, each run bare and with the suite, and compared.

A healthy run with the suite must end bit-identical to the bare run. Each kind is one practice that
users rely on: weights written on purpose, large gradients that harm nothing, losses at zero,
unusual schedules and loops. ``python -m benchmarks.healthy`` runs them.
"""
