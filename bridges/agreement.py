"""Do two models find the same tokens hard? Per-token losses side by side (METHODS 6.6) [G Fig. 33].

The source finds a correlation of 0.93 between the log losses of a sparse and a dense model, against 0.94 between two
dense ones: read a pair against a pair of dense models.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cross_entropy

from bridges.metrics import batches, check_windows, evaluating
from distill.circuits.subject import Subject
from distill.model.run import Runnable

WINDOWS = 64
"""Windows, spread over the sample, that are looked at, up to twice as many."""
FLOOR = 1e-4
"""Loss in nats that smaller ones count as, so that tokens which are nearly sure do not rule a correlation of logs."""


@torch.no_grad()
def token_losses(
    model: Runnable, windows: Int[Tensor, "n T1"], *, batch: int = 8
) -> tuple[Float[Tensor, "n T"], Int[Tensor, "n T"]]:
    """Cross-entropy in nats at every target of the windows, and the model's first choice there.

    ValueError for windows of fewer than two tokens.
    """
    check_windows(windows)
    losses, choices = [], []
    with evaluating(model):
        for part in batches(windows, batch, model):
            logits = model.run(part[:, :-1]).float()
            losses.append(cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").cpu())
            choices.append(logits.argmax(-1).cpu())
    return torch.cat(losses), torch.cat(choices)


def agreement(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], targets: Int[Tensor, "n T"]
) -> dict[str, float | None]:
    """How alike two models are, token by token; both as `token_losses` gives them on the same targets.

    `pearson_log`: correlation of the logarithms of their losses; `spearman`: of their ranks; `same_error`: share of the
    tokens that the first model gets wrong at which the second makes the same choice; `both_wrong`: share of these at
    which the second is wrong at all. None where there is nothing to divide by.
    """
    (a, first), (b, second) = one, other
    logs = torch.stack([a.flatten(), b.flatten()]).double().clamp_min(FLOOR).log()
    deviations = logs.std(1)
    wrong = first != targets
    count = int(wrong.sum())
    varies = bool((deviations > 1e-12).all())
    return {
        "pearson_log": float(torch.corrcoef(logs)[0, 1]) if varies else None,
        "spearman": float(np.corrcoef(rankdata(a.numpy()), rankdata(b.numpy()))[0, 1]) if varies else None,
        "same_error": int((wrong & (first == second)).sum()) / count if count else None,
        "both_wrong": int((wrong & (second != targets)).sum()) / count if count else None,
    }


def agreements(subjects: Sequence[Subject], windows: Int[Tensor, "n T1"]) -> list[dict[str, Any]]:
    """`agreement` of every two models with the same vocabulary, on the same windows; the first of each pair is the one
    whose errors are looked at. [] where there are no two."""
    alike = [one for one in subjects if one.tokenizer.get_vocab() == subjects[0].tokenizer.get_vocab()]
    if len(alike) < 2:
        return []
    windows = windows[:: max(1, len(windows) // WINDOWS)]
    shown = {one.name: token_losses(one.model, windows) for one in alike}
    return [
        {"models": [first, second], **agreement(shown[first], shown[second], windows[:, 1:].cpu())}
        for first, second in combinations(shown, 2)
    ]
