"""The structured form of a loop, on top of Fabric's public names: ``import fabric_lite.trainer as pl``."""

from fabric_lite import callbacks, loggers
from fabric_lite.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from fabric_lite.seed import seed_everything
from fabric_lite.trainer.hooks import Callback
from fabric_lite.trainer.module import LightningModule
from fabric_lite.trainer.trainer import Trainer

__all__ = [
    "Callback",
    "EarlyStopping",
    "LearningRateMonitor",
    "LightningModule",
    "ModelCheckpoint",
    "Trainer",
    "callbacks",
    "loggers",
    "seed_everything",
]
