"""Does the dense model compute the task in the subspace that a bridge assigns to a student's circuit? (**ours**)

1. `live_channels`: which channels of the student's residual stream carry the circuit at each residual site.
2. `bridged_subspace`: B_i, the span of their images under the linear part G_i of the decoder, as an orthonormal basis.
3. `residual_means`: what the dense model's stream is on average, so that a deviation from it can be split.
4. `subspace_test`: sufficiency keeps only the part of the deviation in B_i, necessity removes it, at one site at a time
   and at all sites at once; the task loss of the dense model is the outcome.
5. `random_subspaces` and `principal_subspaces`: controls. Any other (images of random channels, an unrelated student's
   least-squares bridges) can be handed in: a control is one more set of bases.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
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
"""Largest p at which B counts as above chance; it takes 19 controls to get there."""
RANDOM = "random"
"""Family of controls: random subspaces."""
TOKENS_AT_ONCE = 4096
"""Tokens in one pass over several control sets: more no longer fit into a CPU's cache, and take longer."""

Bases = Mapping[str, Float[Tensor, "D _"]]
"""An orthonormal basis (D, dim) of a subspace of the dense stream, by residual site."""
Test = Literal["sufficiency", "necessity", "encode_mask_decode"]


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


# --- controls --------------------------------------------------------------------------------------------------------


def random_subspaces(
    bases: Bases, means: "ResidualMeans", n: int, *, seed: int, matched: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Controls: `n` sets of random subspaces, of the dimensions of `bases`.

    Each set is the whole of `bases` turned by one random rotation, so that its subspaces overlap across sites as those
    of `bases` do: what independent ones keep at one site they lose at the next, and would be beaten by anything.

    Arguments:
        bases: what they are controls for.
        means: of the dense model, with its covariance.
        n: 20 for a quick look, 100 for a result.
        seed: of the draw.
        matched: stretch the stream's axes by a power of its covariance, chosen per site, so that a subspace holds as
            much of the stream's variance as the one in `bases`; else isotropic, which holds far less.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = {site: _directions(basis, means.covariance[site], generator, matched) for site, basis in bases.items()}
    width = max((len(basis) for basis in bases.values()), default=0)
    for _ in range(n):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        # With these signs all rotations are equally likely.
        rotation = q * r.diagonal().sign()
        yield {
            site: torch.linalg.qr(scales[site] @ (rotation @ basis.double().cpu())).Q.to(basis)
            for site, basis in bases.items()
        }


def principal_subspaces(bases: Bases, means: "ResidualMeans") -> dict[str, Tensor]:
    """The subspaces of the dimensions of `bases` that hold most of the stream's variance."""
    return {
        # Eigenvalues come in rising order.
        site: torch.linalg.eigh(means.covariance[site].double().cpu())
        .eigenvectors[:, len(basis) - basis.shape[1] :]
        .to(basis)
        for site, basis in bases.items()
    }


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
    return (vectors * values.pow((low + high) / 4)) @ vectors.T


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

    encoded: Mapping[str, Tensor] = field(default_factory=dict)
    """Mean of what the encoders make of the stream, by residual site, (1, S) or (T, S); empty without bridges."""

    def at(self, site: str, length: int) -> Float[Tensor, "rows D"]:
        """The means for a run over `length` tokens. `ValueError` where means per position do not reach so far."""
        return _reach(self.values[site], length)

    def encoded_at(self, site: str, length: int) -> Float[Tensor, "rows S"]:
        """The means of the encoded stream, as `at`. `ValueError` where they were not measured."""
        if site not in self.encoded:
            raise ValueError(f"means: {site!r} has no mean of its encoder, allowed are means measured with bridges")
        return _reach(self.encoded[site], length)


def _reach(value: Tensor, length: int) -> Tensor:
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
    model: Runnable,
    windows: Int[Tensor, "n T"],
    *,
    bridges: Bridges | None = None,
    per_position: bool | None = None,
    batch: int = 8,
) -> ResidualMeans:
    """Mean and covariance of the residual stream at every residual site, over windows and tokens.

    Arguments:
        windows: token ids of pretraining text.
        bridges: from this model; the means of their encoders are measured as well.
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
    codes: dict[str, Tensor] = {}
    with evaluating(model):
        for part in batches(windows, batch, model):
            for site, stream in recorded(model, part)[1].items():
                rows = stream.double()
                _add(totals, site, rows.sum(0))
                _add(products, site, torch.einsum("btc,btd->cd", rows, rows))
                _add(norms, site, rows.norm(dim=-1).sum(0))
                if bridges is not None:
                    _add(codes, site, bridges.encode(site, stream).double().sum(0))
    n, length = windows.shape
    means, encoded = (
        {site: total / n if split else total.sum(0, keepdim=True) / (n * length) for site, total in sums.items()}
        for sums in (totals, codes)
    )
    # Around means per position, or around the one mean: E[x x^T] - E[mean mean^T].
    covariance = {site: products[site] / (n * length) - mean.T @ mean / len(mean) for site, mean in means.items()}
    return ResidualMeans(
        values={site: mean.float() for site, mean in means.items()},
        covariance={site: value.float() for site, value in covariance.items()},
        protect_first=any(float(norm[0]) > SINK_RATIO * float(norm.median()) for norm in norms.values()),
        encoded={site: mean.float() for site, mean in encoded.items()},
    )


def _add(sums: dict[str, Tensor], site: str, value: Tensor) -> None:
    sums[site] = sums[site] + value if site in sums else value


# --- the test --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SubspaceTest:
    """Outcome of one intervention on the dense model, at one residual site or at all."""

    test: Test
    """Whether only the part in the subspace was kept (sufficiency), that part was removed (necessity), or the stream
    went through the encoder, the circuit's channels and the decoder (encode_mask_decode)."""
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
    controls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Task losses under the same intervention with controls, in nats, by family of controls."""
    other: Mapping[str, float] = field(default_factory=dict)
    """Task losses with single other sets of subspaces, in nats, by name: for reading, no part of the verdict."""
    ceiling: float | None = None
    """Task loss through encoder and decoder with all channels, in nats; None for the other tests."""
    protect_first: bool
    """Whether position 0 was left alone."""

    @property
    def p(self) -> dict[str, float]:
        """(1 + controls that do at least as well) / (1 + controls), in (0, 1], by family that has any controls."""
        sign = -1.0 if self.test == "necessity" else 1.0
        return {
            family: (1 + sum(sign * loss <= sign * self.loss for loss in losses)) / (1 + len(losses))
            for family, losses in self.controls.items()
            if losses
        }

    @property
    def verdicts(self) -> dict[str, str]:
        """By family: "says nothing" (subspace too large), "too few controls", "above chance" or "at chance"."""
        found = {}
        for family, p in self.p.items():
            if self.share > LARGEST_SHARE:
                found[family] = "says nothing"
            elif 1 / (1 + len(self.controls[family])) > CHANCE_LEVEL:
                found[family] = "too few controls"
            else:
                found[family] = "above chance" if p <= CHANCE_LEVEL else "at chance"
        return found

    @property
    def verdict(self) -> str:
        """As in `verdicts`, or "no controls"; above chance only where that is so against every family."""
        if self.share > LARGEST_SHARE:
            return "says nothing"
        found = set(self.verdicts.values())
        return next((one for one in ("at chance", "too few controls", "above chance") if one in found), "no controls")

    def to_json(self) -> dict[str, object]:
        """All of it as plain JSON values: `controls` holds the random subspaces, `families` all other families."""
        return {
            **vars(self),
            "controls": list(self.controls.get(RANDOM, ())),
            "families": {family: list(losses) for family, losses in self.controls.items() if family != RANDOM},
            "other": dict(self.other),
            "p": self.p,
            "verdicts": self.verdicts,
            "verdict": self.verdict,
        }

    def line(self) -> str:
        """One line for a person."""
        medians = [f", {family} {np.median(losses):.3f}" for family, losses in self.controls.items() if losses]
        others = [f", {name} {loss:.3f}" for name, loss in self.other.items()]
        ceiling = "" if self.ceiling is None else f", all channels {self.ceiling:.3f}"
        return (
            f"{self.test} at {self.site}: dim {self.dimension} ({self.share:.0%} of D), loss {self.loss:.3f} "
            f"(model {self.loss_full:.3f}, mean {self.loss_empty:.3f}{ceiling}{''.join(medians + others)}): "
            f"{self.verdict}"
        )


class SubspaceTap:
    """Keeps, or removes, the part of the stream's deviation from the mean that lies in a subspace, at some sites.

    A basis (D, dim) serves the whole batch; of bases (C, D, dim), each serves one stretch of B / C rows.
    """

    def __init__(self, bases: Mapping[str, Tensor], means: ResidualMeans, test: Test) -> None:
        self.bases, self.means, self.test = bases, means, test

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site not in self.bases:
            return x
        basis = self.bases[site].to(x)
        basis = basis if basis.dim() == 3 else basis[None]
        mean = self.means.at(site, x.shape[1]).to(x)
        deviation = (x - mean).reshape(len(basis), -1, x.shape[-1])
        inside = (deviation @ basis @ basis.mT).reshape(x.shape)
        out = mean + inside if self.test == "sufficiency" else x - inside
        return torch.cat([x[:, :1], out[:, 1:]], 1) if self.means.protect_first else out


@torch.no_grad()
def subspace_test(
    dense: Runnable,
    batch: TaskBatch,
    bases: Bases,
    means: ResidualMeans,
    *,
    controls: Mapping[str, Iterable[Bases]] | None = None,
    other: Mapping[str, Bases] | None = None,
    each_site: int = 0,
    tests: tuple[Test, ...] = ("sufficiency", "necessity"),
) -> list[SubspaceTest]:
    """Both tests at each site of `bases` and at all of them together, on one batch of a task's prompts.

    Arguments:
        dense: the dense model.
        batch: encoded prompts of the task.
        bases: the subspaces, by site.
        means: of the dense model.
        controls: by family, sets of other subspaces at the same sites; each family is consumed once.
        other: by name, single sets of subspaces to read the loss against.
        each_site: control sets of each family, the first ones, that are held against every single site too; all are
            held against all sites together.
        tests: which of sufficiency and necessity.

    Returns one record per test and site, in the order of the run, "all" last.
    Raises `ValueError` for prompts longer than the means, and a control or other set without one of the sites.
    """
    batch = batch.to(next(dense.parameters()).device)
    places: list[tuple[str, ...]] = [(site,) for site in bases]
    if len(bases) > 1:
        places.append(tuple(bases))
    cases: list[tuple[Test, tuple[str, ...]]] = [(test, sites) for test in tests for sites in places]
    others = list((other or {}).values())
    _check_sites(bases, others, "other")
    with evaluating(dense):
        streams = recorded_streams(dense, batch)
        full = task_losses(dense, batch, FINAL_SITE, streams[FINAL_SITE])[0]
        empty = {site: basis[:, :0] for site, basis in bases.items()}
        emptied = {sites: _losses(dense, batch, streams, [empty], means, "sufficiency", sites)[0] for sites in places}
        losses = {case: _losses(dense, batch, streams, [bases, *others], means, *case) for case in cases}
        drawn: dict[str, dict[tuple[Test, tuple[str, ...]], list[float]]] = {}
        for family, sets in (controls or {}).items():
            drawn[family] = {case: [] for case in cases}
            for some in _chunks(sets, max(1, TOKENS_AT_ONCE // batch.tokens.numel())):
                _check_sites(bases, some, "controls")
                for case, found in drawn[family].items():
                    mine = some if case[1] == places[-1] else some[: max(0, each_site - len(found))]
                    if mine:
                        found += _losses(dense, batch, streams, mine, means, *case)
    held = {site: variance_share(basis, means.covariance[site]) for site, basis in bases.items()}
    return [
        SubspaceTest(
            test=test,
            site=sites[0] if len(sites) == 1 else ALL,
            dimension=max(bases[site].shape[1] for site in sites),
            share=max(bases[site].shape[1] for site in sites) / dense.d_model,
            variance=max(held[site] for site in sites),
            loss=losses[test, sites][0],
            loss_full=full,
            loss_empty=emptied[sites],
            controls={family: tuple(found.get((test, sites), ())) for family, found in drawn.items()},
            other=dict(zip(other or {}, losses[test, sites][1:], strict=True)),
            protect_first=means.protect_first,
        )
        for test, sites in cases
    ]


def recorded_streams(model: Runnable, batch: TaskBatch) -> dict[str, Tensor]:
    """The residual stream at every site on a task's prompts, from which single-site interventions start."""
    return recorded(model, batch.tokens)[1]


def task_losses(
    model: Runnable, batch: TaskBatch, start: str, residual: Float[Tensor, "CB T D"], tap: Tap | None = None
) -> list[float]:
    """Task losses in nats, mean over prompts, of C runs side by side that start at a site.

    Arguments:
        batch: B prompts, on the device of the model.
        start: residual site. residual: the stream there, C times the B prompts, one run after the other.
        tap: for the rest of the run.
    """
    count = len(residual) // len(batch)
    wide = batch.select(torch.arange(len(batch), device=residual.device).repeat(count))
    # Prompts are padded on the right and attention is causal: padding is out of reach of the last token.
    final = model.run(wide.tokens, tap=tap, start=start, residual=residual, stop=FINAL_SITE)
    rows = torch.arange(len(wide), device=final.device)
    logits = model.readout(final[rows, wide.last], wide.tokens[rows, wide.last])
    return task_loss(logits, wide).view(count, -1).mean(1).tolist()


def _losses(
    model: Runnable,
    batch: TaskBatch,
    streams: Mapping[str, Tensor],
    sets: Sequence[Bases],
    means: ResidualMeans,
    test: Test,
    sites: tuple[str, ...],
) -> list[float]:
    """Task loss with each set of subspaces at `sites`; the runs start at the first of them."""
    stacks = {site: _stack([bases[site] for bases in sets]) for site in sites}
    tap = SubspaceTap(stacks, means, test)
    residual = tap(sites[0], streams[sites[0]].repeat(len(sets), 1, 1))
    return task_losses(model, batch, sites[0], residual, tap)


def _stack(bases: Sequence[Tensor]) -> Float[Tensor, "C D dim"]:
    """Bases of any dimensions in one tensor: a column of zeros adds nothing to a subspace."""
    widest = max(basis.shape[1] for basis in bases)
    return torch.stack([F.pad(basis, (0, widest - basis.shape[1])) for basis in bases])


def _check_sites(bases: Bases, sets: Sequence[Bases], field: str) -> None:
    for one in sets:
        if missing := set(bases) - set(one):
            raise ValueError(f"{field}: one has no subspace at {min(missing)!r}, allowed are those with all sites")


def _chunks(sets: Iterable[Bases], size: int) -> Iterator[list[Bases]]:
    rest = iter(sets)
    while some := list(islice(rest, size)):
        yield some
