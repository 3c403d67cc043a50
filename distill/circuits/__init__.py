"""Tasks, circuits and the tests of how faithful a circuit is."""

from distill.circuits.ablation import Means, node_means
from distill.circuits.circuit import Circuit, CircuitMismatchError
from distill.circuits.edges import EdgeSet, circuit_tap
from distill.circuits.editing import ModelEdit, constants, plan
from distill.circuits.export import export
from distill.circuits.live import LiveWatch
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
from distill.circuits.watch import Watch, make_watch

__all__ = [
    "Circuit",
    "CircuitMismatchError",
    "EdgeSet",
    "LiveWatch",
    "MaskTap",
    "Means",
    "MisfitError",
    "ModelEdit",
    "NodeMasks",
    "Pair",
    "PruneConfig",
    "Standalone",
    "Subject",
    "TargetError",
    "Task",
    "TaskBatch",
    "Watch",
    "all_nodes",
    "batches",
    "circuit_tap",
    "constants",
    "encode",
    "export",
    "load_subject",
    "load_task",
    "make_watch",
    "node_means",
    "nonsense",
    "plan",
    "prune",
    "shuffled",
    "task_names",
]
