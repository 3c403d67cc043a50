"""Tasks, circuits and the tests of how faithful a circuit is."""

from distill.circuits.ablation import Means, node_means
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.edges import EdgeSet, circuit_tap
from distill.circuits.export import export
from distill.circuits.masks import MaskTap, NodeMasks, all_nodes
from distill.circuits.prune import PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.standalone import Standalone
from distill.circuits.subject import Subject, load_subject
from distill.circuits.tasks import (
    MisfitError,
    Pair,
    Task,
    TaskBatch,
    batches,
    encode,
    load_task,
    nonsense,
    shuffled,
    task_names,
)

__all__ = [
    "Circuit",
    "CircuitMismatchError",
    "EdgeSet",
    "MaskTap",
    "Means",
    "MisfitError",
    "NodeMasks",
    "Pair",
    "PruneConfig",
    "Standalone",
    "Subject",
    "TargetError",
    "Task",
    "TaskBatch",
    "all_nodes",
    "batches",
    "circuit_tap",
    "encode",
    "export",
    "load_subject",
    "load_task",
    "node_means",
    "nonsense",
    "prune",
    "shuffled",
    "task_names",
]
