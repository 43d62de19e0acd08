"""TensorBoard itself, started on a real short run, with either of its data servers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import lit_stability
from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import fit

ENTRY = "[tensorboard_plugins]\nstability = lit_stability.tensorboard.loader:StabilityLoader\n"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    callbacks = [FaultInjector([NanLoss(step=20)]), *stability_callbacks()]
    fit(root, callbacks, logger=TensorBoardLogger(root, "run", ""), log_every_n_steps=5)
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A search path on which the plugin is found, whatever is installed here."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "lit_stability_under_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-stability-under-test\n")
    (info / "entry_points.txt").write_text(ENTRY)
    root = Path(lit_stability.__file__).parents[1]
    return os.pathsep.join([str(root), str(folder)])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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


@pytest.fixture(params=["false", "true"], ids=["multiplexer", "data server"])
def served(request, logdir, installed):
    """Address of a TensorBoard, below a prefix, and its process."""
    port = free_port()
    options = {"--load_fast": request.param, "--port": port, "--host": "127.0.0.1"}
    options |= {"--path_prefix": "/behind/proxy"}
    where = "--logdir" if request.param == "true" else "--logdir_spec"
    options[where] = logdir if request.param == "true" else f"named:{logdir}"
    words = [f"{key}={value}" for key, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words],
        env=os.environ | {"PYTHONPATH": installed},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{port}/behind/proxy/data", process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_tensorboard_shows_the_tab_of_a_real_run(served):
    """K5, V4: found by entry point, read by either data server, below a prefix."""
    address, process = served
    plugin = f"{address}/plugin/stability"
    (run,) = wait_for(f"{plugin}/runs", process, lambda runs: runs and runs[0]["incidents"])
    assert (run["layers"], run["incidents"], run["last"]) == (6, 1, 58)
    listing = json.loads(get(f"{address}/plugins_listing"))
    assert listing["stability"]["enabled"] is True
    assert listing["stability"]["tab_name"] == "Stability"
    (incident,) = json.loads(get(f"{plugin}/incidents?run={run['run']}"))
    assert (incident["outcome"], incident["attempt"]) == ("recovered", 21)
    steps = json.loads(get(f"{plugin}/steps?run={run['run']}"))
    assert [row[0] for row in steps["rows"]] == [5, 10, 15, 20, 21, *range(25, 65, 5)]
    entry = get(f"{address}/plugin_entry.html?name=stability")
    assert 'import("./index.js")' in entry
    assert "render" in get(f"{plugin}/static/index.js")
