"""What each node matters to a task, from gradients: a ranking to start learning from, and a baseline to learn
against."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.estimators import Estimator
from distill.circuits.objectives import Prompts
from distill.circuits.settings import ATTRIBUTIONS, require
from distill.model.run import Runnable


def attribute(
    model: Runnable, batches: Sequence[Prompts], masks: Estimator, *, method: str = "integrated"
) -> Float[Tensor, "groups"]:
    """What each group matters to the task, in nats, at least 0: mean over the batches of |dJ/dm|.

    The gradient to a mask is that to the activation times the activation's difference from its ablation value. With
    `gradient` it is taken at the full model, m = 1. It is 0 there wherever the task is solved without effort, so that
    `integrated` takes it at points at which all masks have one value in (0, 1), evenly spaced, one for each batch
    (integrated gradients over nodes). The sign is dropped, as a node that is needed may do harm while what it works
    with is still half off. Gradients to the weights should be off (`answers.frozen`). ValueError for another method.
    """
    require(method in ATTRIBUTIONS, "method", method, ", ".join(ATTRIBUTIONS))
    total = torch.zeros_like(masks.tau)
    for place, prompts in enumerate(batches):
        point = (place + 0.5) / len(batches) if method == "integrated" else 1.0
        mask = torch.full_like(total, point).requires_grad_()
        tap = prompts.tap(masks.spread(mask), competition=True)
        loss = two_way_loss(answer_difference(model, prompts.batch, tap))
        total += torch.autograd.grad(loss, mask)[0].abs() / len(batches)
    return total
