"""How good a student and its bridges are, per residual site, beside what would be had for nothing.

Bridges to compare with come from `bridges.baselines`; measure them with the same function, and hand the results in.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from bridges.hybrid import cross, hybrid, random_passes
from bridges.losses import cross_entropy, kl
from bridges.maps import Bridges, check_bridges
from distill.model.run import Runnable
from distill.model.sites import Record, residual_sites
from distill.model.topk import abs_topk

LEAST_GAP = 1.0
"""Nats by which the dense model must beat the bigram model for a recovered share to mean anything."""

Metrics = dict[str, Any]


@torch.no_grad()
def bridge_metrics(
    dense: Runnable,
    student: Runnable,
    bridges: Bridges,
    windows: Int[Tensor, "n T1"],
    *,
    batch: int = 8,
    bigram_ce: float | None = None,
    mixtures: int = 0,
    baselines: Mapping[str, Any] | None = None,
) -> Metrics:
    """Everything that is published of a student with bridges, as plain JSON values.

    Arguments:
        windows: held-out token ids; column t + 1 is the target of column t.
        batch: windows per pass.
        bigram_ce: loss of a bigram model on the same windows (`bigram_loss`), for the recovered shares.
        mixtures: number of random passes with any number of switches to measure as well, out of the 2^(2L).
        baselines: metrics of other bridges or students, by name, passed through (`bridges.baselines.measure`).

    Returns `sites.{site}` with
        `nmse_d2s` of f_i(h_d) for h_s and `nmse_s2d` of g_i(h_s) for h_d, over all positions but the first, and
        `..._first` at position 0 alone (normalised by the variance there; null where there is none);
        `nmse_d2s_topk`: the same prediction for AbsTopK_k(h_s); `floor`: the least `nmse_d2s` that k channels allow;
        `kl_d2s`, `kl_s2d`: KL(dense || hybrid), `hybrid_ce_d2s`, `hybrid_ce_s2d`: cross-entropy of the hybrid passes
        with their one switch at this site, in nats per token, mean over all targets;
        `recovered_d2s`, `recovered_s2d`: (CE_bigram - CE_hybrid) / (CE_bigram - CE_dense), null where `bigram_ce` is
        not given or the gap to the dense model is below `LEAST_GAP`;
    and over all sites `dense_ce`, `student_ce`, `student_kl`, `bigram_ce`, `recovered_student`, `mixtures`, `tokens`,
    `k`, `baselines`, and `warnings` in words.

    Raises `ValueError` for no windows, windows of fewer than two tokens, and models that the bridges do not fit.
    """
    check_windows(windows)
    check_bridges(bridges, n_layer=dense.n_layer, d_dense=dense.d_model, d_sparse=student.d_model)
    passes = random_passes(dense.n_layer, mixtures, seed=0) if mixtures else []
    sums = _Sums(bridges.shape.k)
    with evaluating(dense, student):
        for part in batches(windows, batch, dense):
            tokens, targets = part[:, :-1], part[:, 1:]
            y_d, h_d = recorded(dense, tokens)
            y_s, h_s = recorded(student, tokens)
            sums.begin(targets, y_d)
            sums.judge("dense", y_d)
            sums.judge("student", y_s)
            for site in bridges.sites:
                f = cross(bridges, student, site, h_d[site], to="sparse")
                g = cross(bridges, dense, site, h_s[site], to="dense")
                sums.compare(site, f, g, h_d[site], h_s[site])
                sums.judge(f"d2s {site}", student.run(tokens, start=site, residual=f))
                sums.judge(f"s2d {site}", dense.run(tokens, start=site, residual=g))
            for index, (begin, switches) in enumerate(passes):
                sums.judge(f"mixture {index}", hybrid(dense, student, bridges, tokens, switches, begin=begin))
    return {
        "sites": {site: _site(sums, site, bigram_ce) for site in bridges.sites},
        "dense_ce": sums.ce("dense"),
        "student_ce": sums.ce("student"),
        "student_kl": sums.kl("student"),
        "bigram_ce": bigram_ce,
        "recovered_student": sums.recovered("student", bigram_ce),
        "mixtures": [
            {"begin": begin, "switches": list(switches), "ce": sums.ce(name), "kl": sums.kl(name)}
            for name, (begin, switches) in ((f"mixture {index}", one) for index, one in enumerate(passes))
        ],
        "tokens": sums.tokens,
        "k": bridges.shape.k,
        "baselines": dict(baselines or {}),
        "warnings": _warnings(sums, bigram_ce),
    }


def recorded(
    model: Runnable, tokens: Int[Tensor, "B T"], sites: Collection[str] | None = None
) -> tuple[Float[Tensor, "B T V"], dict[str, Tensor]]:
    """Logits, and the residual stream at some residual sites; None: at every one."""
    tap = Record(residual_sites(model.n_layer) if sites is None else sites)
    return model.run(tokens, tap=tap), tap.values


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All models in evaluation mode; the mode of every part is put back at the end."""
    # Part by part: a wrapper may call itself in training while the model in it is not.
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Share:
    """NMSE over batches: squared error over the variance around the mean of all of them."""

    def __init__(self) -> None:
        self.error = self.rows = 0.0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, predicted: Tensor, target: Tensor) -> None:
        a, b = (x.reshape(-1, x.shape[-1]).double() for x in (predicted, target))
        self.error += float((a - b).square().sum())
        self.total, self.squares, self.rows = (
            self.total + b.sum(0),
            self.squares + b.square().sum(0),
            self.rows + len(b),
        )

    def value(self) -> float | None:
        if not isinstance(self.total, Tensor) or not isinstance(self.squares, Tensor):
            return None
        variance = float((self.squares - self.total.square() / self.rows).sum())
        # What is left of squares that cancel to the last digit is no variance.
        return self.error / variance if variance > 1e-12 * float(self.squares.sum()) else None


class _Sums:
    """What is added up over batches, by name."""

    def __init__(self, k: int) -> None:
        self.k, self.tokens = k, 0
        self.shares: dict[str, _Share] = {}
        self.losses: dict[str, tuple[float, float]] = {}

    def begin(self, targets: Tensor, reference: Tensor) -> None:
        self.targets, self.reference = targets, reference
        self.tokens += targets.numel()

    def judge(self, name: str, logits: Tensor) -> None:
        """Cross-entropy and divergence from the dense model."""
        count = self.targets.numel()
        ce, divergence = self.losses.get(name, (0.0, 0.0))
        ce += count * float(cross_entropy(logits, self.targets))
        self.losses[name] = (ce, divergence + count * float(kl(self.reference, logits)))

    def compare(self, site: str, f: Tensor, g: Tensor, h_d: Tensor, h_s: Tensor) -> None:
        """Squared errors of both maps, position 0 apart."""
        sparse = abs_topk(h_s, self.k)
        pairs = {"d2s": (f, h_s), "s2d": (g, h_d), "d2s_topk": (f, sparse), "floor": (sparse, h_s)}
        for name, (predicted, target) in pairs.items():
            self.shares.setdefault(f"{name} {site}", _Share()).add(predicted[:, 1:], target[:, 1:])
            self.shares.setdefault(f"{name}_first {site}", _Share()).add(predicted[:, :1], target[:, :1])

    def ce(self, name: str) -> float:
        return self.losses[name][0] / self.tokens

    def kl(self, name: str) -> float:
        return self.losses[name][1] / self.tokens

    def recovered(self, name: str, bigram_ce: float | None) -> float | None:
        if bigram_ce is None or bigram_ce - self.ce("dense") < LEAST_GAP:
            return None
        return (bigram_ce - self.ce(name)) / (bigram_ce - self.ce("dense"))


def _warnings(sums: _Sums, bigram_ce: float | None) -> list[str]:
    if bigram_ce is None or bigram_ce - sums.ce("dense") >= LEAST_GAP:
        return []
    return [
        f"the dense model's loss, {sums.ce('dense'):.3f} nats, is less than {LEAST_GAP:g} below that of a bigram "
        f"model, {bigram_ce:.3f}: a share of it that is recovered would mean little and is left out"
    ]


def _site(sums: _Sums, site: str, bigram_ce: float | None) -> Metrics:
    found: Metrics = {}
    for side in ("d2s", "s2d"):
        name = f"{side} {site}"
        found[f"nmse_{side}"] = sums.shares[name].value()
        found[f"nmse_{side}_first"] = sums.shares[f"{side}_first {site}"].value()
        found[f"kl_{side}"] = sums.kl(name)
        found[f"hybrid_ce_{side}"] = sums.ce(name)
        found[f"recovered_{side}"] = sums.recovered(name, bigram_ce)
    found["nmse_d2s_topk"] = sums.shares[f"d2s_topk {site}"].value()
    found["floor"] = sums.shares[f"floor {site}"].value()
    return found


def check_windows(windows: Int[Tensor, "n T1"]) -> None:
    """`ValueError` unless there is at least one window of two tokens."""
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: got shape {tuple(windows.shape)}, allowed are at least one window of two tokens")


def batches(windows: Int[Tensor, "n T1"], batch: int, model: nn.Module) -> Iterator[Int[Tensor, "B T1"]]:
    """The windows, `batch` at a time, on the device of the model. `ValueError` for a batch below 1."""
    if batch < 1:
        raise ValueError(f"batch: got {batch}, allowed are whole numbers from 1")
    device = next(model.parameters()).device
    for part in windows.split(batch):
        yield part.to(device, torch.int64)


# --- figure ----------------------------------------------------------------------------------------------------------


def plot_metrics(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Three panels over the residual sites: NMSE with its floor, KL, and cross-entropy of the hybrid passes.

    Arguments:
        metrics: of `bridge_metrics`.
        path: an image file; its ending says the format (.png, .svg, .pdf).
    """
    sites = list(metrics["sites"])
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("NMSE", {"nmse_d2s": "dense to sparse", "nmse_s2d": "sparse to dense", "floor": "floor of dense to sparse"}),
        ("KL(dense || hybrid), nats", {"kl_d2s": "dense to sparse", "kl_s2d": "sparse to dense"}),
        ("cross-entropy, nats", {"hybrid_ce_d2s": "dense to sparse", "hybrid_ce_s2d": "sparse to dense"}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for key, label in lines.items():
            values = [metrics["sites"][site][key] for site in sites]
            heights = [float("nan") if value is None else value for value in values]
            axes.plot(range(len(sites)), heights, marker=".", label=label, linestyle=":" if key == "floor" else "-")
        axes.set_xticks(range(len(sites)), sites, rotation=90, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        if title.startswith("NMSE"):
            axes.axhline(1.0, color="gray", linewidth=0.8, label="predicting the mean")
        if title.startswith("cross"):
            for key, style in (("dense_ce", "-"), ("student_ce", "--"), ("bigram_ce", ":")):
                if metrics[key] is not None:
                    axes.axhline(metrics[key], color="gray", linewidth=0.8, linestyle=style, label=key)
        axes.legend(fontsize=7)
    figure.savefig(Path(path), dpi=120)
