"""Held-out loss of any model with a `run`: nats per token, over fixed windows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.model.run import Runnable


@torch.no_grad()
def per_token_losses(model: Runnable, windows: Int[Tensor, "n T1"], *, batch: int = 16) -> Float[Tensor, "n T"]:
    """Cross-entropy of every target token, in nats, as float32 on the CPU.

    Arguments:
        model: run in evaluation mode, on the device where it lies; its mode is put back.
        windows: token ids; column t + 1 is the target of column t, so T = T1 - 1.
        batch: windows per pass.

    Raises `ValueError` for a batch below 1, no window, or windows of fewer than two tokens.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, allowed are whole numbers from 1")
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: got shape {tuple(windows.shape)}, allowed are at least one window of two tokens")
    device = next(iter(model.parameters())).device
    was_training = model.training
    model.train(False)
    try:
        parts = []
        for tokens in windows.split(batch):
            tokens = tokens.to(device, torch.int64)
            logits = model.run(tokens[:, :-1])
            # Row by row: the softmax of a large vocabulary would double the memory of the logits.
            rows = zip(logits, tokens[:, 1:], strict=True)
            parts.append(torch.stack([F.cross_entropy(row.float(), to, reduction="none") for row, to in rows]).cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)


def heldout_loss(model: Runnable, windows: Int[Tensor, "n T1"], *, batch: int = 16) -> float:
    """Mean cross-entropy in nats per token, over all targets of all windows.

    Arguments and errors as for `per_token_losses`.
    """
    return float(per_token_losses(model, windows, batch=batch).double().mean())


@torch.no_grad()
def continuation(model: Runnable, prompt: Int[Tensor, " n"], number: int) -> Int[Tensor, " m"]:
    """The `number` tokens that a model goes on with, each the likeliest one; on the CPU.

    Arguments:
        model: run as it is, on the device where it lies; it looks back as far as its context reaches.
        prompt: token ids, one at least.
        number: how many, 0 and more.
    """
    tokens = prompt.to(next(iter(model.parameters())).device, torch.int64)[None]
    for _ in range(number):
        logits = model.run(tokens[:, -model.context :])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].cpu()
