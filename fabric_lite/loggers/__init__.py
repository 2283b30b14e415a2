"""Loggers: where metrics go. ``CSVLogger`` needs nothing; the others need the package of their backend."""

from fabric_lite.loggers.csv_logger import CSVLogger
from fabric_lite.loggers.logger import Logger, rank_zero_experiment
from fabric_lite.loggers.mlflow_logger import MLFlowLogger
from fabric_lite.loggers.pictures import PictureLogger
from fabric_lite.loggers.tensorboard_logger import TensorBoardLogger
from fabric_lite.loggers.wandb_logger import WandbLogger

__all__ = [
    "CSVLogger",
    "Logger",
    "MLFlowLogger",
    "PictureLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "rank_zero_experiment",
]
