"""What a split would cost before it is tried: memory and time of each stage. Torch-free."""

from engine.planning.memory import ModelSizes, StageSize, read_sizes, stage_sizes
from engine.planning.prediction import Measured, StageSpeed, Timing, predict, stage_step_s

__all__ = [
    "Measured",
    "ModelSizes",
    "StageSize",
    "StageSpeed",
    "Timing",
    "predict",
    "read_sizes",
    "stage_sizes",
    "stage_step_s",
]
