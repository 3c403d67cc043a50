"""What bridges are measured against: a bigram model, bridges that know only the mean, least-squares bridges.

Least-squares bridges tell how much of the dense model can be read linearly from *any* sparse model, one that was
trained without it included. Measure these with `bridges.metrics.bridge_metrics`, as the fitted ones.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.maps import Bridges, BridgeShape
from bridges.metrics import batches, check_windows, evaluating, recorded
from distill.model.run import Runnable
from distill.model.sites import residual_sites


def bigram_loss(
    train: np.ndarray, windows: Int[Tensor, "n T1"], *, vocab_size: int, limit: int | None = 20_000_000
) -> float:
    """Cross-entropy in nats per token of a bigram model counted on `train`, over all targets of `windows`.

        p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a)),    p(b) = (n(b) + 1) / (N + V)

    with d(a) the number of different tokens seen after a (Witten-Bell smoothing, which has no constant to tune).
    Memory grows with the pairs seen, never with V^2.

    Arguments:
        train: token ids, one row.
        windows: what it is judged on.
        vocab_size: V.
        limit: tokens of `train` that are counted, from its start; None for all.

    Raises `ValueError` for windows of fewer than two tokens and ids outside the vocabulary.
    """
    check_windows(windows)
    ids = np.asarray(train[:limit], np.int64)
    judged = windows.cpu().numpy().astype(np.int64)
    for name, values in (("train", ids), ("windows", judged)):
        if values.size and not 0 <= values.min() <= values.max() < vocab_size:
            raise ValueError(f"{name}: ids {values.min()} to {values.max()}, allowed are 0 to {vocab_size - 1}")
    pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    first = pairs // vocab_size
    seen = np.bincount(first, weights=counts, minlength=vocab_size)
    different = np.bincount(first, minlength=vocab_size)
    unigram = (np.bincount(ids, minlength=vocab_size) + 1) / (len(ids) + vocab_size)
    a, b = judged[:, :-1].ravel(), judged[:, 1:].ravel()
    wanted = a * vocab_size + b
    place = np.minimum(np.searchsorted(pairs, wanted), max(len(pairs) - 1, 0))
    found = np.where(pairs[place] == wanted, counts[place], 0) if len(pairs) else np.zeros(len(wanted))
    # A token that nothing followed has no d(a): the unigram model speaks for it.
    weight = np.maximum(different[a], 1)
    return float(-np.log((found + weight * unigram[b]) / (seen[a] + weight)).mean())


@torch.no_grad()
def least_squares_bridges(
    dense: Runnable,
    student: Runnable,
    windows: Int[Tensor, "n T1"],
    *,
    k: int | None = None,
    ridge: float = 1e-4,
    batch: int = 8,
    skip_first: bool = False,
) -> Bridges:
    """The bridges of least squared error between two models, without training: ridge regression at every site.

    Arguments:
        windows: token ids to fit on; the last column is left out, as it is in training.
        k: channels that encoders leave non-zero (chosen after the fit, which knows nothing of it); None: all.
        ridge: added to the covariance of what is read, as a share of its mean variance; not on the bias.
        batch: windows per pass.
        skip_first: leave position 0 out, for dense models with a giant norm there.

    Raises `ValueError` for windows of fewer than two tokens (three with `skip_first`), and a ridge of 0 or less.
    """
    if not ridge > 0:
        raise ValueError(f"ridge: got {ridge}, allowed are numbers above 0")
    bridges = _blank(dense, student, k)
    for site, moments in _moments(dense, student, windows, batch, skip_first).items():
        split = dense.d_model
        mean, covariance = moments.mean(), moments.covariance()
        ends = (mean[:split], mean[split:])
        for linear, source, target, block, crossed in (
            (bridges.encoder(site), *ends, covariance[:split, :split], covariance[split:, :split]),
            (bridges.decoder(site), *ends[::-1], covariance[split:, split:], covariance[:split, split:]),
        ):
            # A stream without any variance (all weights zero) would leave nothing to divide by.
            weight = ridge * float(block.diagonal().mean()) or 1.0
            regular = block + weight * torch.eye(len(block), dtype=block.dtype, device=block.device)
            solved = torch.linalg.solve(regular, crossed.T).T
            linear.weight.copy_(solved)
            linear.bias.copy_(target - solved @ source)
    return bridges


@torch.no_grad()
def mean_bridges(dense: Runnable, student: Runnable, windows: Int[Tensor, "n T1"], *, batch: int = 8) -> Bridges:
    """Bridges that say the mean stream of the other model whatever they read; their NMSE is 1, their KL the worst bar.

    Arguments and errors as for `least_squares_bridges`.
    """
    bridges = _blank(dense, student, None)
    for site, moments in _moments(dense, student, windows, batch, False).items():
        mean = moments.mean()
        for linear, value in (
            (bridges.encoder(site), mean[dense.d_model :]),
            (bridges.decoder(site), mean[: dense.d_model]),
        ):
            linear.weight.zero_()
            linear.bias.copy_(value)
    return bridges


def _blank(dense: Runnable, student: Runnable, k: int | None) -> Bridges:
    shape = BridgeShape(
        n_layer=dense.n_layer,
        d_dense=dense.d_model,
        d_sparse=student.d_model,
        k=student.d_model if k is None else k,
    )
    return Bridges(shape).to(next(student.parameters()).device)


class _Moments:
    """Sums of the two streams side by side, and of their products, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, rows: Float[Tensor, "*rows C"]) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).double()
        self.rows += len(rows)
        self.total, self.products = self.total + rows.sum(0), self.products + rows.T @ rows

    def mean(self) -> Float[Tensor, " C"]:
        assert isinstance(self.total, Tensor)
        return self.total / self.rows

    def covariance(self) -> Float[Tensor, "C C"]:
        assert isinstance(self.products, Tensor)
        return self.products / self.rows - torch.outer(self.mean(), self.mean())


def _moments(dense: Runnable, student: Runnable, windows: Tensor, batch: int, skip_first: bool) -> dict[str, _Moments]:
    """Moments per site of the dense and the student's stream side by side."""
    check_windows(windows)
    begin = int(skip_first)
    if windows.shape[1] < 2 + begin:
        raise ValueError(
            f"windows: got shape {tuple(windows.shape)}, allowed are three tokens and more with skip_first"
        )
    found = {site: _Moments() for site in residual_sites(dense.n_layer)}
    with evaluating(dense, student):
        for part in batches(windows, batch, dense):
            h_d, h_s = (recorded(model, part[:, :-1])[1] for model in (dense, student))
            for site, moments in found.items():
                moments.add(torch.cat([h_d[site][:, begin:], h_s[site][:, begin:].to(h_d[site])], -1))
    return found
