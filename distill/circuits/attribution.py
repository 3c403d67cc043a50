"""What each node matters to a task, from gradients: a ranking to start the learning of masks from."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.masks import MaskTap, NodeMasks
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


def attribute(model: Runnable, batches: Sequence[TaskBatch], means: Means, masks: NodeMasks) -> Float[Tensor, "groups"]:
    """What each group matters to the task: |dJ/dm|, mean over points at which all masks have one value in (0, 1).

    In nats, at least 0; the points are evenly spaced, one per batch. A gradient at the full model alone would be 0
    wherever the task is solved without effort; the sign is dropped, as a node that is needed may do harm while what it
    works with is still half off. Gradients to the weights should be off (`answers.frozen`).
    """
    total = torch.zeros_like(masks.tau)
    means = means.to(total.device)
    for place, batch in enumerate(batches):
        mask = torch.full_like(total, (place + 0.5) / len(batches)).requires_grad_()
        loss = two_way_loss(answer_difference(model, batch, MaskTap(masks.spread(mask), means, competition=True)))
        total += torch.autograd.grad(loss, mask)[0].abs() / len(batches)
    return total
