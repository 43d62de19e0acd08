"""TensorBoard itself, started on a real short run, with either of its data servers."""

import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_stability import stability_callbacks
from lit_stability.faults import FaultInjector, NanLoss
from tests.conftest import fit
from tests.tensorboard.live import get, search_path, tensorboard, wait_for


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("logs")
    callbacks = [FaultInjector([NanLoss(step=20)]), *stability_callbacks()]
    fit(root, callbacks, logger=TensorBoardLogger(root, "run", ""), log_every_n_steps=5)
    return root


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return search_path(tmp_path_factory.mktemp("site"))


@pytest.fixture(params=["false", "true"], ids=["multiplexer", "data server"])
def served(request, logdir, installed):
    """Address of a TensorBoard, below a prefix, and its process."""
    fast = request.param == "true"
    where = {"logdir": logdir} if fast else {"logdir_spec": f"named:{logdir}"}
    options = {"load_fast": request.param, "path_prefix": "/behind/proxy", **where}
    with tensorboard(installed, **options) as (address, process):
        yield f"{address}/data", process


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
