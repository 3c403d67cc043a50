"""distill-bridges: from a dense language model to a circuit that a person can read.

    from distill import SparseTransformer, load_subject, load_task, prune, PruneConfig
    subject = load_subject("sparse")
    circuit = prune(subject.model, load_task("for_while"), subject.tokenizer, subject.means, PruneConfig())

Importing this package registers `SparseTransformer` with transformers, so that `AutoModelForCausalLM` loads it.
`distill` knows one model at a time; two together are the business of `bridges`.
"""

from distill.circuits import Circuit, PruneConfig, Subject, Task, encode, load_subject, load_task, prune, task_names
from distill.data import TokenData, prepare
from distill.model import (
    Architecture,
    DenseModel,
    Record,
    Replace,
    SparseTransformer,
    SparseTransformerConfig,
    chain,
    load_model,
    load_tokenizer,
    node_locations,
    residual_sites,
)
from distill.training import TrainConfig, heldout_loss, pretrain

__all__ = [
    "Architecture",
    "Circuit",
    "DenseModel",
    "PruneConfig",
    "Record",
    "Replace",
    "SparseTransformer",
    "SparseTransformerConfig",
    "Subject",
    "Task",
    "TokenData",
    "TrainConfig",
    "chain",
    "encode",
    "heldout_loss",
    "load_model",
    "load_subject",
    "load_task",
    "load_tokenizer",
    "node_locations",
    "prepare",
    "pretrain",
    "prune",
    "residual_sites",
    "task_names",
]
