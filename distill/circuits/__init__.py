"""Tasks, circuits and the tests of how faithful a circuit is."""

from distill.circuits.ablation import Means, node_means
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.masks import MaskTap, NodeMasks, all_nodes
from distill.circuits.prune import PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.subject import Subject, load_subject
from distill.circuits.tasks import Pair, Task, TaskBatch, encode, load_task, task_names

__all__ = [
    "Circuit",
    "CircuitMismatchError",
    "MaskTap",
    "Means",
    "NodeMasks",
    "Pair",
    "PruneConfig",
    "Subject",
    "TargetError",
    "Task",
    "TaskBatch",
    "all_nodes",
    "encode",
    "load_subject",
    "load_task",
    "node_means",
    "prune",
    "task_names",
]
