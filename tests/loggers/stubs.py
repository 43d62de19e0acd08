"""W&B, MLflow and Comet without their packages, made from the recorded signatures.

A call with an argument that the real method does not have is a TypeError, as it is there.
"""

import inspect
import json
from types import SimpleNamespace

from lightning.pytorch.loggers import WandbLogger as RealWandbLogger
from lightning.pytorch.loggers.logger import Logger

from tests.loggers.record import FILE

RECORDED = {}
for each in json.loads(FILE.read_text()).values():
    RECORDED |= each["calls"]


class Server:
    """Takes calls, or fails, or hangs."""

    def __init__(self, act=None):
        self.calls = []
        self._act = act

    def take(self, name, arguments):
        if self._act is not None:
            self._act()
        self.calls.append((name, arguments))

    def of(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def method(self, path):
        """A method with a recorded signature."""
        kinds = [
            inspect.Parameter(
                *(name, inspect._ParameterKind[kind]),
                default=None if optional else inspect.Parameter.empty,
            )
            for name, kind, optional in RECORDED[path]
        ]
        signature = inspect.Signature(kinds)

        def call(*args, **kwargs):
            self.take(path.rsplit(".", 1)[1], dict(signature.bind(*args, **kwargs).arguments))

        return call

    def object(self, path, **attributes):
        """An object with all recorded methods of a class."""
        names = [p for p in RECORDED if p.rsplit(".", 1)[0] == path]
        methods = {p.rsplit(".", 1)[1]: self.method(p) for p in names}
        return SimpleNamespace(**attributes, **methods)


class Stub(Logger):
    """A logger with the folder and names of the real one."""

    version, save_dir = "run1", None
    name = "project"

    def __init__(self, root, act=None):
        super().__init__()
        self.server, self.save_dir = Server(act), str(root)
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_hyperparams(self, *args, **options):
        pass


class WandbLogger(Stub):
    """`log_text` has the signature of Lightning's own."""

    def __init__(self, root, act=None):
        super().__init__(root, act)
        summary = SimpleNamespace(update=lambda values: self.server.take("summary", values))
        attributes = {"summary": summary, "tags": ("mine",), "id": "run1"}
        self.experiment = self.server.object("wandb.wandb_run.Run", **attributes)

    experiment = None

    def log_text(self, *args, **kwargs):
        bound = inspect.signature(RealWandbLogger.log_text).bind(self, *args, **kwargs)
        self.server.take("log_text", dict(bound.arguments))

    def artifact(self, *args, **kwargs):
        """Takes the place of ``wandb.Artifact``."""
        self.server.method("wandb.Artifact.__init__")(*args, **kwargs)
        return self.server.object("wandb.Artifact")


class MLFlowLogger(Stub):
    """`experiment` is a client that is told the run."""

    run_id, experiment = "run1", None

    def __init__(self, root, act=None):
        super().__init__(root, act)
        self.experiment = self.server.object("mlflow.MlflowClient")


class CometLogger(Stub):
    """`experiment` is Comet's."""

    experiment = None

    def __init__(self, root, act=None):
        super().__init__(root, act)
        self.experiment = self.server.object("comet_ml.OfflineExperiment")
