"""Copies of the state that a thread makes, with delays: they stand for copies from a device."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

from lit_stability.callbacks.auto_rollback import snapshot_store
from lit_stability.callbacks.auto_rollback.snapshot_store import SnapshotStore
from lit_stability.callbacks.last_known_good import checkpoint_manager
from lit_stability.training_state.copies import Copies


class ThreadCopies(Copies):
    """Copies in a thread, each after a call of `before`."""

    immediate = False

    def __init__(self, before):
        self._before = before
        self._thread = ThreadPoolExecutor(1)
        self._running = []

    def start(self, pairs):
        # Like a stream, it reads the memory that a tensor has now, even if it gets other memory.
        pairs = [(targets, [source.detach() for source in sources]) for targets, sources in pairs]
        self._running.append(self._thread.submit(self._run, pairs))

    def _run(self, pairs):
        self._before()
        super().start(pairs)

    def wait(self):
        running, self._running = self._running, []
        for each in running:
            each.result()

    def finish(self):
        self.wait()


class Unordered(ThreadCopies):
    """Copies that no optimizer's step waits for: what they copy may be torn."""

    def wait(self):
        pass

    def finish(self):
        super().wait()


def delay_copies(monkeypatch, kind=ThreadCopies, shortest=0.0, longest=0.02):
    """Has all copies of the state made in a thread, each after a random delay in seconds."""
    delays = random.Random(0)

    def copies(device):
        return kind(lambda: time.sleep(delays.uniform(shortest, longest)))

    for each in (snapshot_store, checkpoint_manager):
        monkeypatch.setattr(each, "copies_to_host", copies)
    monkeypatch.setattr(SnapshotStore, "_copies_of", lambda store, snapshot: store._to_host)
