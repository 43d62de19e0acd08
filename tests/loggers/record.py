"""Records the signatures of what the adapters call of W&B, MLflow and Comet.

``python -m tests.loggers.record``, where these are installed, writes ``recorded.json``, from which
the stubs of the tests are made. ``make test-loggers`` fails if the file is out of date.
"""

import inspect
import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_name("recorded.json")
CALLS = {
    "wandb": {
        "wandb.Artifact": ("__init__", "add_dir"),
        "wandb.wandb_run.Run": ("alert", "log_artifact"),
    },
    "mlflow-skinny": {"mlflow.MlflowClient": ("log_text", "set_tag", "log_artifacts")},
    "comet_ml": {"comet_ml.OfflineExperiment": ("log_text", "log_table", "log_other", "add_tag")},
}


def signature_of(path, method):
    module, name = path.rsplit(".", 1)
    found = inspect.signature(getattr(getattr(import_module(module), name), method))
    return [
        [p.name, p.kind.name, p.default is not inspect.Parameter.empty]
        for p in list(found.parameters.values())[1:]
    ]


def recorded(package):
    """What is recorded of a package that is installed."""
    calls = CALLS[package].items()
    return {f"{path}.{m}": signature_of(path, m) for path, methods in calls for m in methods}


if __name__ == "__main__":
    found = {name: {"version": version(name), "calls": recorded(name)} for name in CALLS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
