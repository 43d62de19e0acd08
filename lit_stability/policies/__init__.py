"""What to do about an anomaly, as data: state machines that choose and count, and do nothing.

Imports neither torch nor Lightning.
"""
