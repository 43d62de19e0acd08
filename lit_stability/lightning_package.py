"""What this package uses of Lightning, from the package that the program trains with.

The only module that imports Lightning: as `lightning`, or as `pytorch_lightning`, whichever
`choose_lightning` returns when this module is first imported. Both have the same names; type
checkers see those of `lightning`.
"""

from typing import TYPE_CHECKING

from lit_stability.lightning_choice import choose_lightning, distribution
from lit_stability.versions import require_versions

PACKAGE = choose_lightning()
"""``lightning`` or ``pytorch_lightning``."""

require_versions(distribution(PACKAGE))

if TYPE_CHECKING or PACKAGE == "lightning":
    from lightning import __version__ as LIGHTNING_VERSION
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.utilities import types as fabric_types
    from lightning.fabric.utilities.data import sized_len
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        seed_everything,
    )
    from lightning.pytorch.callbacks import (
        BaseFinetuning,
        Checkpoint,
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        WeightAveraging,
    )
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.loops import fetchers
    from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from lightning.pytorch.utilities import (
        GradClipAlgorithmType,
        move_data_to_device,
        rank_zero_info,
    )
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.parsing import (
        lightning_getattr,
        lightning_hasattr,
        lightning_setattr,
    )
else:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.utilities import types as fabric_types
    from lightning_fabric.utilities.data import sized_len
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        seed_everything,
    )
    from pytorch_lightning import __version__ as LIGHTNING_VERSION
    from pytorch_lightning.callbacks import (
        BaseFinetuning,
        Checkpoint,
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        WeightAveraging,
    )
    from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.loops import fetchers
    from pytorch_lightning.plugins import HalfPrecision, MixedPrecision, Precision
    from pytorch_lightning.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
        Strategy,
    )
    from pytorch_lightning.utilities import (
        GradClipAlgorithmType,
        move_data_to_device,
        rank_zero_info,
    )
    from pytorch_lightning.utilities.exceptions import SIGTERMException
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.parsing import (
        lightning_getattr,
        lightning_hasattr,
        lightning_setattr,
    )

__all__ = [
    "LIGHTNING_VERSION",
    "PACKAGE",
    "BaseFinetuning",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DummyLogger",
    "EarlyStopping",
    "FSDPStrategy",
    "GradClipAlgorithmType",
    "GradientAccumulationScheduler",
    "HalfPrecision",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "MixedPrecision",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "Precision",
    "SIGTERMException",
    "SLURMEnvironment",
    "SingleDeviceStrategy",
    "Strategy",
    "TensorBoardLogger",
    "Trainer",
    "WeightAveraging",
    "fabric_types",
    "fetchers",
    "is_overridden",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "move_data_to_device",
    "rank_zero_info",
    "seed_everything",
    "sized_len",
]
