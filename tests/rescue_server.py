"""What a process of the rescue table may meet with, for its tests; light to import."""

import os
import time


def serve(pipe):
    """Send each job back, unless its name is what becomes of it."""
    while True:
        job = pipe.recv()
        if job.scenario == "hangs":
            time.sleep(600)
        if job.scenario == "dies":
            os._exit(3)
        pipe.send(job)
