"""Callbacks for a raw loop: plain objects, whose hooks ``Fabric(callbacks=...)`` and ``fabric.call`` call by name."""

from fabric_lite.callbacks.early_stopping import EarlyStopping
from fabric_lite.callbacks.model_checkpoint import ModelCheckpoint
from fabric_lite.callbacks.monitors import DeviceMemoryMonitor, GradientNormMonitor, LearningRateMonitor
from fabric_lite.callbacks.spike_detection import SpikeDetection, TrainingSpikeError

__all__ = [
    "DeviceMemoryMonitor",
    "EarlyStopping",
    "GradientNormMonitor",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "SpikeDetection",
    "TrainingSpikeError",
]
