"""What bridges are trained and judged by: pure functions of tensors.

Divergences and cross-entropies are in nats per token; the normalised mean squared error is a share, 0 for a perfect
prediction and 1 for one as good as the mean of each channel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from distill.model import operations
from distill.model.topk import abs_topk

SMALLEST_VARIANCE = 1e-12
"""A target whose sum of squared deviations is below this has no variance to explain; it is not divided by less."""


def nmse(predicted: Float[Tensor, "*rows C"], target: Float[Tensor, "*rows C"]) -> Float[Tensor, ""]:
    """Normalised mean squared error of one residual stream as a prediction of another (**ours** for [G A.3]).

        NMSE(a, b) = sum (a - b)^2 / sum (b - mean_c b)^2

    over all rows (batch and tokens) and channels, mean_c being the mean of channel c over the rows. No gradient
    reaches the target: the student must not make itself easy to predict by shrinking.

    Arguments:
        predicted: a.
        target: b, of which at least two rows should differ; see `SMALLEST_VARIANCE`.

    Returns a scalar in [0, inf), 1 for predicting the channel means.
    """
    target = target.detach()
    return (predicted - target).square().sum() / spread(target).clamp_min(SMALLEST_VARIANCE)


def nmse_floor(target: Float[Tensor, "*rows C"], k: int) -> Float[Tensor, ""]:
    """The least NMSE that an encoder with `k` non-zero channels can reach: residual streams are dense, it is not.

        floor = sum |b - AbsTopK_k(b)|^2 / sum (b - mean_c b)^2

    Returns a scalar in [0, inf); 0 from k = C on. Raises `ValueError` for k below 1.
    """
    target = target.detach()
    return (target - abs_topk(target, k)).square().sum() / spread(target).clamp_min(SMALLEST_VARIANCE)


def spread(target: Float[Tensor, "*rows C"]) -> Float[Tensor, ""]:
    """sum (b - mean_c b)^2, the squared error of predicting the mean of each channel."""
    rows = target.reshape(-1, target.shape[-1])
    return (rows - rows.mean(0)).square().sum()


def cross_entropy(logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"]) -> Float[Tensor, ""]:
    """Mean over tokens of -log softmax(logits)[target], in nats per token."""
    return operations.cross_entropy(logits.float(), targets)


@dataclass(frozen=True)
class Reference:
    """What divergences are measured from: log-probabilities of classes of tokens. No gradient reaches them."""

    log_p: Float[Tensor, "*rows C"]
    """Of the classes."""
    kept: Int[Tensor, "*rows m"] | None = None
    """Tokens that are classes of their own, all others being one class behind them; None: every token is a class."""

    @classmethod
    def of(cls, logits: Float[Tensor, "*rows V"], top: int | None = None) -> "Reference":
        """Of the logits of a model: the full vocabulary, or its `top` likeliest tokens and the others together.

        The probabilities of the top tokens are not renormalised, so that mass that is put elsewhere still costs.
        Raises `ValueError` for `top` below 1.
        """
        logits = logits.detach().float()
        if top is None or top >= logits.shape[-1]:
            return cls(logits.log_softmax(-1))
        if top < 1:
            raise ValueError(f"top: got {top}, allowed are 1 and more, or none for the full vocabulary")
        kept = logits.topk(top, dim=-1, sorted=False).indices
        return cls(_with_tail(logits, kept), kept)

    def kl(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, ""]:
        """KL(reference || softmax(logits)), mean over tokens, in nats per token, in [0, inf)."""
        logits = logits.float()
        log_q = logits.log_softmax(-1) if self.kept is None else _with_tail(logits, self.kept)
        tokens = max(log_q.numel() // log_q.shape[-1], 1)
        return F.kl_div(log_q, self.log_p, reduction="sum", log_target=True) / tokens


def kl(
    logits_p: Float[Tensor, "*rows V"], logits_q: Float[Tensor, "*rows V"], *, top: int | None = None
) -> Float[Tensor, ""]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), mean over tokens, in nats per token.

    With `top`, the vocabulary is the `top` likeliest tokens under p and one class for all the others: a lower bound
    of the full divergence.

    Arguments:
        logits_p: the reference's logits. No gradient reaches them.
        logits_q: the logits that are judged.
        top: number of tokens kept apart; None, or V and more, for the full vocabulary.

    Returns a scalar in [0, inf). Raises `ValueError` for `top` below 1.
    """
    return Reference.of(logits_p, top).kl(logits_q)


def _with_tail(logits: Float[Tensor, "*rows V"], kept: Int[Tensor, "*rows m"]) -> Float[Tensor, "*rows m+1"]:
    """Log-probabilities of the kept tokens and of all the others together."""
    # The tail is summed itself: one minus the kept mass would lose all digits where the tail is small.
    tail = logits.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    classes = torch.cat([logits.gather(-1, kept), tail], -1)
    return classes - classes.logsumexp(-1, keepdim=True)
