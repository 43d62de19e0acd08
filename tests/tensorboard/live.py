"""A TensorBoard of its own process on a folder of real runs, found by its entry point."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import lit_stability

ENTRY = "[tensorboard_plugins]\nstability = lit_stability.tensorboard.loader:StabilityLoader\n"


def search_path(folder):
    """A search path on which the plugin is found once, whatever is installed here.

    It comes first, under the package's own name: one that is installed is not looked at then.
    """
    info = folder / "lit_stability-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-stability\n")
    (info / "entry_points.txt").write_text(ENTRY)
    root = Path(lit_stability.__file__).parents[1]
    return os.pathsep.join([str(folder), str(root)])


@contextmanager
def tensorboard(path, **options):
    """Its address and its process; options as on its command line."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [f"--{k}={v}" for k, v in (options | {"port": port, "host": "127.0.0.1"}).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{port}{options.get('path_prefix', '')}", process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_for(url, process, until, seconds=60):
    """The JSON of an address, once it satisfies `until`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        try:
            found = json.loads(get(url))
            if until(found):
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} is not ready after {seconds} s")
