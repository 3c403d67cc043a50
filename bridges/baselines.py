"""What bridges are measured against: a bigram model, bridges that know only the mean, least-squares bridges.

Least-squares bridges tell how much of the dense model can be read linearly from *any* sparse model, one that was
trained without it included. `measure` measures all of these beside the fitted ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridges.maps import Bridges, BridgeShape
from bridges.metrics import Metrics, batches, bridge_metrics, check_windows, evaluating, recorded
from distill.data.tokens import tokenizer_fingerprint
from distill.model import DenseModel, SparseTransformer, load_model, load_tokenizer
from distill.model.run import Runnable
from distill.model.sites import residual_sites

MEAN, LEAST_SQUARES, UNRELATED, KL_ONLY = "mean", "least_squares", "unrelated", "kl_only"
"""Names of baselines: bridges that say the mean; least-squares bridges of the student itself, of a sparse model that
never saw the dense one, and of a student that was trained with KL(dense || student) alone."""
MIXTURES = 16
"""Random passes with any number of switches that are measured of a student."""
_SHIPPED = "sparse"
_TOLD = (
    *("nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d"),
    *("hybrid_ce_d2s", "hybrid_ce_s2d", "recovered_d2s", "recovered_s2d"),
)


def measure(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    heldout: Int[Tensor, "n T1"],
    *,
    train: Int[Tensor, "m T1"],
    bigram_ce: float,
    rivals: Mapping[str, Runnable] | None = None,
    skip_first: bool = False,
    batch: int = 8,
    mixtures: int = MIXTURES,
) -> Metrics:
    """`bridge_metrics` of a student with its bridges, and of what they have to beat.

    Arguments:
        heldout: windows that all are judged on.
        train: windows that means and least-squares bridges are fitted on.
        bigram_ce: loss of a bigram model on `heldout`.
        rivals: other sparse models of this depth and vocabulary, such as `UNRELATED` and `KL_ONLY`.
        skip_first: leave position 0 out of the least-squares fits.
        batch: windows per pass.
        mixtures: random passes of the student.

    Returns the metrics with `baselines.{name}`, each with `student_ce` and `student_kl` of its sparse model, `k`, and
    `sites.{site}` with NMSE, KL, cross-entropy and recovered share as there. Bridges leave as many non-zero channels
    as the fitted ones do, in proportion to the width.
    Raises `ValueError` for a rival that does not fit the dense model, and as `bridge_metrics`.
    """
    share = bridges.shape.k / bridges.shape.d_sparse
    found = {MEAN: _told(dense, student, mean_bridges(dense, student, train, batch=batch), heldout, bigram_ce, batch)}
    for name, model in {LEAST_SQUARES: student, **(rivals or {})}.items():
        for field in ("n_layer", "vocab_size"):
            if getattr(model, field) != getattr(dense, field):
                raise ValueError(f"{name}: {field} {getattr(model, field)}, allowed is {getattr(dense, field)}")
        k = max(1, round(share * model.d_model))
        fitted = least_squares_bridges(dense, model, train, k=k, batch=batch, skip_first=skip_first)
        found[name] = _told(dense, model, fitted, heldout, bigram_ce, batch)
    return bridge_metrics(
        dense, student, bridges, heldout, batch=batch, bigram_ce=bigram_ce, mixtures=mixtures, baselines=found
    )


def _told(
    dense: Runnable, model: Runnable, bridges: Bridges, heldout: Tensor, bigram_ce: float, batch: int
) -> dict[str, Any]:
    """What of the metrics is told of a baseline."""
    metrics = bridge_metrics(dense, model, bridges, heldout, batch=batch, bigram_ce=bigram_ce)
    sites = {site: {name: values[name] for name in _TOLD} for site, values in metrics["sites"].items()}
    return {**{name: metrics[name] for name in ("student_ce", "student_kl", "k")}, "sites": sites}


def load_rivals(
    dense: Runnable, tokenizer: PreTrainedTokenizerBase, *, unrelated: str = "auto", kl_only: str = "none"
) -> dict[str, Runnable]:
    """Sparse models to measure a student beside, by the name of the baseline, on the dense model's device.

    Arguments:
        dense: the dense model. tokenizer: its tokenizer.
        unrelated: a sparse model that never saw it, by folder or short name; "auto": the shipped one where depth and
            tokenizer agree; "none".
        kl_only: a student that was trained with KL(dense || student) alone (preset kl-only), by folder; "none".

    Raises `ValueError` for one that is asked for and is no sparse model, or of another depth or tokenizer.
    """
    found: dict[str, Runnable] = {}
    for name, asked in ((UNRELATED, unrelated), (KL_ONLY, kl_only)):
        if asked == "none":
            continue
        source = _SHIPPED if asked == "auto" else asked
        model = load_model(source)
        reason = _differs(model, source, dense, tokenizer)
        if reason is None:
            torch.nn.Module.to(model, next(dense.parameters()).device)
            found[name] = model
        elif asked != "auto":
            raise ValueError(f"{name}: {source} {reason}")
    return found


def _differs(
    model: SparseTransformer | DenseModel, source: str, dense: Runnable, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """In what a model is no rival of a dense model's student, None where it is one."""
    if not isinstance(model, SparseTransformer):
        return "is a dense model, allowed are sparse ones"
    if model.n_layer != dense.n_layer:
        return f"has {model.n_layer} layers, allowed is {dense.n_layer}"
    same = tokenizer_fingerprint(load_tokenizer(source)) == tokenizer_fingerprint(tokenizer)
    return None if same and model.vocab_size == dense.vocab_size else "has another tokenizer than the dense model"


def bigram_loss(
    train: np.ndarray, windows: Int[Tensor, "n T1"], *, vocab_size: int, limit: int | None = 20_000_000
) -> float:
    """Cross-entropy in nats per token of a bigram model counted on `train`, over all targets of `windows`.

        p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a)),    p(b) = (n(b) + 1) / (N + V)

    with d(a) the number of different tokens seen after a (Witten-Bell smoothing, which has no constant to tune).
    Memory grows with the pairs seen, never with V^2.

    Arguments:
        train: token ids, one row, or one for each separate sequence.
        windows: what it is judged on.
        vocab_size: V.
        limit: tokens of a long row that are counted, from its start; None for all.

    Raises `ValueError` for windows of fewer than two tokens and ids outside the vocabulary.
    """
    check_windows(windows)
    rows = limit if limit is None or train.ndim == 1 else max(1, limit // train.shape[1])
    ids = np.asarray(train[:rows], np.int64)
    judged = windows.cpu().numpy().astype(np.int64)
    for name, values in (("train", ids), ("windows", judged)):
        if values.size and not 0 <= values.min() <= values.max() < vocab_size:
            raise ValueError(f"{name}: ids {values.min()} to {values.max()}, allowed are 0 to {vocab_size - 1}")
    pairs, counts = np.unique(ids[..., :-1] * vocab_size + ids[..., 1:], return_counts=True)
    first = pairs // vocab_size
    seen = np.bincount(first, weights=counts, minlength=vocab_size)
    different = np.bincount(first, minlength=vocab_size)
    unigram = (np.bincount(ids.ravel(), minlength=vocab_size) + 1) / (ids.size + vocab_size)
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
