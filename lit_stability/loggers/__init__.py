"""What is written to the loggers of a Trainer: scalars to all of them, incidents through adapters.

>>> class Notebook:
...     '''A logger that this package does not know.'''
...
...     def __init__(self):
...         self.pages = []
>>> class NotebookAdapter(LoggerAdapter):
...     '''Writes the report of each incident to a page.'''
...
...     @classmethod
...     def accepts(cls, logger):
...         return isinstance(logger, Notebook)
...
...     def text(self, incident, report, step):
...         self.logger.pages.append(report)
>>> register_adapter(NotebookAdapter)
>>> type(adapter_of(Notebook(), None)).__name__
'NotebookAdapter'
"""

from lit_stability.loggers.adapter import LoggerAdapter, adapter_of, register_adapter
from lit_stability.loggers.comet import CometAdapter
from lit_stability.loggers.csv import CsvAdapter
from lit_stability.loggers.mlflow import MlflowAdapter
from lit_stability.loggers.tensorboard import TensorBoardAdapter
from lit_stability.loggers.wandb import TableAdapter, WandbAdapter

_OWN: tuple[type[LoggerAdapter], ...] = (
    *(TableAdapter, TensorBoardAdapter, CsvAdapter, CometAdapter, MlflowAdapter, WandbAdapter),
)
"""The last is asked first: those that know a logger by name before those that look what it has."""
for _adapter in _OWN:
    register_adapter(_adapter)

__all__ = ["LoggerAdapter", "adapter_of", "register_adapter"]
