"""Tasks, the one loop, averages, checkpoints and resume, machines, logging."""

from pantarhei.training.averages import Average
from pantarhei.training.flow_task import FlowTask
from pantarhei.training.loop import LoopConfig, TrainingDiverged, TrainResult, train
from pantarhei.training.runs import Run
from pantarhei.training.task import Optimization, Task, Trained, Update, held

__all__ = [
    "Average",
    "FlowTask",
    "LoopConfig",
    "Optimization",
    "Run",
    "Task",
    "TrainResult",
    "Trained",
    "TrainingDiverged",
    "Update",
    "held",
    "train",
]
