"""Does the dense model compute the task in the subspace that a bridge assigns to a student's circuit? (**ours**)

1. `live_channels`: which channels of the student's residual stream carry the circuit at each residual site.
2. `bridged_subspace`: B_i, the span of their images under the linear part G_i of the decoder, as an orthonormal basis.
3. `residual_means`: what the dense model's stream is on average, so that a deviation from it can be split.
4. `subspace_test`: sufficiency keeps only the part of the deviation in B_i, necessity removes it, at one site at a time
   and at all sites at once; the task loss of the dense model is the outcome.
5. `random_subspaces`: controls. Any other family of subspaces (images of random channels, principal components, an
   unrelated student's bridges) can be handed in instead: a control is just another set of bases.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.maps import Bridges
from bridges.metrics import batches, evaluating, recorded
from distill.circuits.ablation import SINK_RATIO
from distill.circuits.tasks import TaskBatch, task_loss
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE, Tap, residual_sites

ALL = "all"
"""In place of a site: all residual sites at once."""
LARGEST_SHARE = 0.5
"""dim(B) / D above which a test says nothing."""
CHANCE_LEVEL = 0.05
"""Share of controls that may do as well as B for it to count as above chance."""

Bases = Mapping[str, Float[Tensor, "D dim"]]
"""An orthonormal basis of a subspace of the dense stream, by residual site."""
Test = Literal["sufficiency", "necessity"]


# --- the subspace of a circuit ---------------------------------------------------------------------------------------


def live_channels(nodes: Mapping[str, Bool[Tensor, " width"]], *, n_layer: int, d_model: int) -> dict[str, Tensor]:
    """Channels of the residual stream that carry a circuit, by residual site, each a bool per channel (S,).

    A channel is live at a site if a kept `resid_delta` writes it before the site, or a kept `act_in` reads it at the
    site or after: a circuit may write in layer 0 and read in layer 10.

    Arguments:
        nodes: kept nodes by location (`Circuit.nodes`). Read-only position channels behind the first S are no part
            of the stream.
        n_layer: layers. d_model: S, of the model of the circuit.

    Raises `ValueError` for a location that is missing.
    """
    sublayers = [f"{i}.{part}" for i in range(n_layer) for part in ("attn", "mlp")]
    missing = [
        f"{one}.{kind}" for one in sublayers for kind in ("act_in", "resid_delta") if f"{one}.{kind}" not in nodes
    ]
    if missing:
        raise ValueError(f"nodes: {missing[0]!r} is missing, allowed are the nodes of a circuit of {n_layer} layers")
    reads = [nodes[f"{one}.act_in"][:d_model].bool() for one in sublayers]
    writes = [nodes[f"{one}.resid_delta"].bool() for one in sublayers]
    live = {}
    # Sublayer j reads at site j and has written from site j + 1 on.
    for index, site in enumerate(residual_sites(n_layer)):
        found = torch.zeros(d_model, dtype=torch.bool, device=reads[0].device)
        for mask in (*writes[:index], *reads[index:]):
            found = found | mask
        live[site] = found
    return live


def bridged_subspace(
    bridges: Bridges, live: Mapping[str, Bool[Tensor, " S"]], *, tolerance: float | None = None
) -> dict[str, Tensor]:
    """B_i = span of G_i[:, live], an orthonormal basis (D, dim) by site; dim is the rank and may be 0.

    Arguments:
        live: live channels by site.
        tolerance: singular values below this share of the largest do not count; by default rounding's.
    """
    bases = {}
    for site, mask in live.items():
        matrix = bridges.decoder_matrix(site)
        images = matrix[:, mask.to(matrix.device)].double().cpu().numpy()
        basis = scipy.linalg.orth(images, rcond=tolerance) if images.size else np.zeros((len(images), 0))
        bases[site] = torch.from_numpy(basis).to(matrix)
    return bases


def random_subspaces(
    bases: Bases, means: "ResidualMeans", n: int, *, seed: int, matched: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Controls: `n` sets of random subspaces, of the dimensions of `bases`.

    Arguments:
        bases: what they are controls for.
        means: of the dense model, with its covariance.
        n: 20 for a quick look, 100 for a result.
        seed: of the draw.
        matched: draw directions so that a subspace holds as much of the stream's variance as the one in `bases`, by
            Gaussians of covariance Sigma^a with a chosen per site; else isotropic, which holds far less.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = {site: _directions(basis, means.covariance[site], generator, matched) for site, basis in bases.items()}
    for _ in range(n):
        drawn = {}
        for site, basis in bases.items():
            gaussian = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
            drawn[site] = torch.linalg.qr(scales[site] @ gaussian).Q.to(basis)
        yield drawn


def variance_share(basis: Float[Tensor, "D dim"], covariance: Float[Tensor, "D D"]) -> float:
    """Share of the total variance that lies in a subspace, in [0, 1]; 0 where there is no variance."""
    basis, covariance = basis.double().cpu(), covariance.double().cpu()
    total = float(covariance.trace())
    return float(((covariance @ basis) * basis).sum()) / total if total > 0 else 0.0


def _directions(basis: Tensor, covariance: Tensor, generator: torch.Generator, matched: bool) -> Tensor:
    """A matrix that turns white noise into directions whose span holds the variance that `basis` does."""
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    if not matched or basis.shape[1] in (0, len(values)) or float(values[-1]) <= 0:
        return torch.eye(len(values), dtype=torch.float64)
    values = (values / values[-1]).clamp_min(1e-9)
    target = variance_share(basis, covariance)
    gaussian = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    low, high = -2.0, 4.0
    for _ in range(20):
        power = (low + high) / 2
        span = torch.linalg.qr(values.pow(power / 2)[:, None] * gaussian).Q
        held = float((values[:, None] * span.square()).sum() / values.sum())
        low, high = (power, high) if held < target else (low, power)
    return vectors * values.pow((low + high) / 4)


# --- the dense model's average stream --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ResidualMeans:
    """Mean and covariance of a model's residual stream on a sample of its pretraining distribution."""

    values: Mapping[str, Tensor]
    """Mean by residual site: (1, D), or (T, D) where means are per position."""
    covariance: Mapping[str, Tensor]
    """Covariance around these means by residual site, (D, D)."""
    protect_first: bool
    """Whether position 0 is never touched, as the norm there exceeds 10 times the median."""

    def at(self, site: str, length: int) -> Float[Tensor, "rows D"]:
        """The means for a run over `length` tokens. `ValueError` where means per position do not reach so far."""
        value = self.values[site]
        if value.shape[0] == 1:
            return value
        if length > value.shape[0]:
            raise ValueError(
                f"length: {length} tokens, but the residual means were measured up to {value.shape[0]}; "
                "measure them on longer windows"
            )
        return value[:length]


@torch.no_grad()
def residual_means(
    model: Runnable, windows: Int[Tensor, "n T"], *, per_position: bool | None = None, batch: int = 8
) -> ResidualMeans:
    """Mean and covariance of the residual stream at every residual site, over windows and tokens.

    Arguments:
        windows: token ids of pretraining text.
        per_position: one mean per position; none: for models with learned positions.
        batch: windows per pass.

    Raises `ValueError` for no windows, or a batch below 1.
    """
    if windows.numel() == 0:
        raise ValueError(f"windows: got shape {tuple(windows.shape)}, allowed is at least one token")
    split = model.has_positions if per_position is None else per_position
    totals: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    with evaluating(model):
        for part in batches(windows, batch, model):
            for site, stream in recorded(model, part)[1].items():
                rows = stream.double()
                for sums, value in (
                    (totals, rows.sum(0)),
                    (products, torch.einsum("btc,btd->cd", rows, rows)),
                    (norms, rows.norm(dim=-1).sum(0)),
                ):
                    sums[site] = sums[site] + value if site in sums else value
    n, length = windows.shape
    # Around means per position, or around the one mean: E[x x^T] - E[mean mean^T].
    means = {site: total / n if split else total.sum(0, keepdim=True) / (n * length) for site, total in totals.items()}
    covariance = {site: products[site] / (n * length) - mean.T @ mean / len(mean) for site, mean in means.items()}
    return ResidualMeans(
        values={site: mean.float() for site, mean in means.items()},
        covariance={site: value.float() for site, value in covariance.items()},
        protect_first=any(float(norm[0]) > SINK_RATIO * float(norm.median()) for norm in norms.values()),
    )


# --- the test --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SubspaceTest:
    """Outcome of one intervention on the dense model, at one residual site or at all."""

    test: Test
    """Whether only the part in the subspace was kept (sufficiency), or that part was removed (necessity)."""
    site: str
    """Residual site, or "all"."""
    dimension: int
    """Dimension of the subspace; the largest one over sites for "all"."""
    share: float
    """Dimension over the width of the stream, in [0, 1]."""
    variance: float
    """Share of the stream's variance in the subspace, in [0, 1]; the largest one over sites for "all"."""
    loss: float
    """Task loss under the intervention, in nats."""
    loss_full: float
    """Task loss of the model left alone, in nats."""
    loss_empty: float
    """Task loss with the whole stream at its mean there, in nats."""
    controls: tuple[float, ...]
    """Task losses under the same intervention with the control subspaces, in nats."""
    protect_first: bool
    """Whether position 0 was left alone."""

    @property
    def as_good(self) -> float | None:
        """Share of the controls that do at least as well as the subspace; None without controls."""
        if not self.controls:
            return None
        sign = 1.0 if self.test == "sufficiency" else -1.0
        return sum(sign * control <= sign * self.loss for control in self.controls) / len(self.controls)

    @property
    def verdict(self) -> str:
        """ "says nothing" (subspace too large), "no controls", "above chance" or "at chance"."""
        if self.share > LARGEST_SHARE:
            return "says nothing"
        if self.as_good is None:
            return "no controls"
        return "above chance" if self.as_good <= CHANCE_LEVEL else "at chance"

    def to_json(self) -> dict[str, object]:
        """All of it as plain JSON values."""
        return {**vars(self), "controls": list(self.controls), "as_good": self.as_good, "verdict": self.verdict}

    def line(self) -> str:
        """One line for a person."""
        controls = f", controls {np.median(self.controls):.3f}" if self.controls else ""
        return (
            f"{self.test} at {self.site}: dim {self.dimension} ({self.share:.0%} of D), loss {self.loss:.3f} "
            f"(model {self.loss_full:.3f}, mean {self.loss_empty:.3f}{controls}): {self.verdict}"
        )


class SubspaceTap:
    """Keeps, or removes, the part of the stream's deviation from the mean that lies in a subspace, at some sites."""

    def __init__(self, bases: Bases, means: ResidualMeans, test: Test) -> None:
        self.bases, self.means, self.test = bases, means, test

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site not in self.bases:
            return x
        basis = self.bases[site].to(x)
        mean = self.means.at(site, x.shape[1]).to(x)
        inside = ((x - mean) @ basis) @ basis.T
        out = mean + inside if self.test == "sufficiency" else x - inside
        return torch.cat([x[:, :1], out[:, 1:]], 1) if self.means.protect_first else out


@torch.no_grad()
def subspace_test(
    dense: Runnable,
    batch: TaskBatch,
    bases: Bases,
    means: ResidualMeans,
    *,
    controls: Iterable[Bases] = (),
    tests: tuple[Test, ...] = ("sufficiency", "necessity"),
) -> list[SubspaceTest]:
    """Both tests at each site of `bases` and at all of them together, on one batch of a task's prompts.

    Arguments:
        dense: the dense model.
        batch: encoded prompts of the task.
        bases: the subspaces, by site.
        means: of the dense model.
        controls: other subspaces, by the same sites; consumed once, one at a time.
        tests: which of the two.

    Returns one record per test and site, in the order of the run, "all" last.
    Raises `ValueError` for prompts longer than the means, and controls without one of the sites.
    """
    batch = batch.to(next(dense.parameters()).device)
    places: list[tuple[str, ...]] = [(site,) for site in bases]
    if len(bases) > 1:
        places.append(tuple(bases))
    cases: list[tuple[Test, tuple[str, ...]]] = [(test, sites) for test in tests for sites in places]
    with evaluating(dense):
        streams = recorded_streams(dense, batch)
        full = _loss(dense, batch, streams, bases, means, None, ())
        empty = {name: basis[:, :0] for name, basis in bases.items()}
        emptied = {sites: _loss(dense, batch, streams, empty, means, "sufficiency", sites) for sites in places}
        losses = {case: _loss(dense, batch, streams, bases, means, *case) for case in cases}
        drawn: dict[tuple[Test, tuple[str, ...]], list[float]] = {case: [] for case in cases}
        for control in controls:
            if missing := set(bases) - set(control):
                raise ValueError(f"controls: one has no subspace at {min(missing)!r}, allowed are those with all sites")
            for case in cases:
                drawn[case].append(_loss(dense, batch, streams, control, means, *case))
    held = {site: variance_share(basis, means.covariance[site]) for site, basis in bases.items()}
    return [
        SubspaceTest(
            test=test,
            site=sites[0] if len(sites) == 1 else ALL,
            dimension=max(bases[site].shape[1] for site in sites),
            share=max(bases[site].shape[1] for site in sites) / dense.d_model,
            variance=max(held[site] for site in sites),
            loss=losses[test, sites],
            loss_full=full,
            loss_empty=emptied[sites],
            controls=tuple(drawn[test, sites]),
            protect_first=means.protect_first,
        )
        for test, sites in cases
    ]


def recorded_streams(model: Runnable, batch: TaskBatch) -> dict[str, Tensor]:
    """The residual stream at every site on a task's prompts, from which single-site interventions start."""
    return recorded(model, batch.tokens)[1]


def _loss(
    model: Runnable,
    batch: TaskBatch,
    streams: Mapping[str, Tensor],
    bases: Bases,
    means: ResidualMeans,
    test: Test | None,
    sites: tuple[str, ...],
) -> float:
    """Task loss with the intervention at `sites`; the run starts at the first of them."""
    start = sites[0] if sites else FINAL_SITE
    tap: Tap | None = None
    residual = streams[start]
    if test is not None:
        tap = SubspaceTap({site: bases[site] for site in sites}, means, test)
        residual = tap(start, residual)
    # Prompts are padded on the right and attention is causal: padding is out of reach of the last token.
    final = model.run(batch.tokens, tap=tap, start=start, residual=residual, stop=FINAL_SITE)
    rows = torch.arange(len(batch), device=final.device)
    logits = model.readout(final[rows, batch.last], batch.tokens[rows, batch.last])
    return float(task_loss(logits, batch).mean())
