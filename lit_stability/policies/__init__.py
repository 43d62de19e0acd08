"""Policies: state machines that choose the response to an anomaly; callbacks carry it out.

Imports neither torch nor Lightning.
"""
