"""What pretraining minimises."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from distill.model import DenseModel, SparseTransformer
from distill.model.operations import cross_entropy

Terms = dict[str, float | Tensor]
Objective = Callable[[Int[Tensor, "B T1"], int], tuple[Tensor, Terms]]
"""(tokens with the last target column, step) -> (mean loss, terms to log)."""


def next_token_loss(model: SparseTransformer | DenseModel) -> Objective:
    """The usual objective: mean cross-entropy of each next token, in nats per token."""

    def objective(tokens: Int[Tensor, "B T1"], step: int) -> tuple[Tensor, Terms]:
        logits = model.run(tokens[:, :-1])
        if logits.dtype == torch.bfloat16:  # eight bits of a logarithm are too few
            logits = logits.float()
        return cross_entropy(logits, tokens[:, 1:]), {}

    return objective
