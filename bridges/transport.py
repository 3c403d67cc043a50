"""A student's circuit carried across the bridge: does the dense model do the task by what the circuit points to?

`add_subspaces` puts the bridged subspace test with its controls, and encode-mask-decode, into a comparison.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.baselines import least_squares_bridges
from bridges.compare import CompareConfig, Comparison
from bridges.lineup import STUDENT, TEACHER, Lineup
from bridges.maps import Bridges
from bridges.metrics import batches, evaluating, recorded
from bridges.ratios import SPARSE
from bridges.subspace import (
    RANDOM,
    ResidualMeans,
    SubspaceTest,
    bridged_subspace,
    live_channels,
    principal_subspaces,
    random_subspaces,
    recorded_streams,
    residual_means,
    subspace_test,
    task_losses,
    variance_share,
)
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.model.run import Runnable
from distill.model.sites import layer_of

CHANNELS, PRINCIPAL, UNRELATED = "channels", "principal", "unrelated"
"""Controls: images of random active channels (a family), the first principal components of the stream, and the images
of the circuit of a sparse model that never saw the dense one, by least-squares bridges."""
SITE_CONTROLS = 20
"""Controls of each family that a test at a single site is held against: as many as a p of 0.05 takes."""
PAIRS = 32
"""Pairs of prompts that the test looks at."""
WINDOWS = 128
"""Windows, spread over a model's sample, that means are measured on."""
ACTIVE = 0.01
"""A channel is active where its standard deviation is above this share of the root mean square over channels."""


def add_subspaces(comparison: Comparison, lineup: Lineup, tasks: Sequence[Task], config: CompareConfig) -> Comparison:
    """Adds `tasks.{task}.bridge`, the bridged subspace test (METHODS 6.3), for each task with a student's circuit.

    A list of `SubspaceTest.to_json`: one entry per test and site, "all" sites last, then encode-mask-decode per site;
    None where there is no bridge, no circuit of the student, or the dense model cannot do the task. The tests at all
    sites are held against `config.subspaces` random subspaces of equal dimension and variance, and as many images of
    random active channels, those at a single site against 20 of each at most; encode-mask-decode against 20 sets of
    random channels. Beside each stands the loss with the first principal components, and with the unrelated student's
    circuit (`unrelated_bridges`), without which success shows only that the information can be decoded.
    """
    teacher, student = lineup.subject(TEACHER), lineup.subject(STUDENT)
    rows = {name: {**row, "bridge": None} for name, row in comparison.record["tasks"].items()}
    chosen = [
        task
        for task in tasks
        if (task.name, STUDENT) in comparison.circuits and rows[task.name][TEACHER]["loss_full"] < config.able
    ]
    if lineup.bridges is not None and teacher is not None and student is not None and chosen:
        means = residual_means(teacher.model, spread(teacher.sample)[:, :-1], bridges=lineup.bridges)
        active = active_channels(student.model, spread(student.sample)[:, :-1])
        stranger = unrelated_bridges(lineup)
        for task in tqdm(chosen, desc="bridged subspaces", unit="task", delay=2):
            nodes = comparison.circuits[task.name, STUDENT].nodes
            live = live_channels(nodes, n_layer=student.model.n_layer, d_model=student.model.d_model)
            other = unrelated_bases(comparison, task.name, stranger)
            found = _test(teacher, lineup.bridges, task, live, active, means, config, other)
            rows[task.name]["bridge"] = [test.to_json() for test in found]
    record: dict[str, Any] = {**comparison.record, "tasks": rows}
    return replace(comparison, record=record)


def _test(
    teacher: Subject,
    bridges: Bridges,
    task: Task,
    live: Mapping[str, Tensor],
    active: Mapping[str, Tensor],
    means: ResidualMeans,
    config: CompareConfig,
    unrelated: Mapping[str, Tensor] | None,
) -> list[SubspaceTest]:
    n, seed = config.subspaces, config.prune.seed
    pairs = min(PAIRS, task.size("test"))
    batch = encode(task, teacher.tokenizer, "test", pairs, seed, context=teacher.model.context)
    bases = bridged_subspace(bridges, live)
    found = subspace_test(
        teacher.model,
        batch,
        bases,
        means,
        controls={
            RANDOM: random_subspaces(bases, means, n, seed=seed),
            CHANNELS: (bridged_subspace(bridges, one) for one in random_channels(live, active, n, seed=seed)),
        },
        other={PRINCIPAL: principal_subspaces(bases, means), **({UNRELATED: unrelated} if unrelated else {})},
        each_site=min(n, SITE_CONTROLS),
    )
    masks = random_channels(live, active, min(n, SITE_CONTROLS), seed=seed)
    return [*found, *masked_test(teacher.model, batch, bridges, live, means, controls=masks)]


def unrelated_bridges(lineup: Lineup) -> Bridges | None:
    """Least-squares bridges between the bridged dense model and the comparison's own sparse model, which never saw it.

    Fitted on at most 128 windows. None where there is no bridge, or the two differ in depth or tokenizer.
    """
    teacher, sparse = lineup.subject(TEACHER), lineup.subject(SPARSE)
    if teacher is None or sparse is None or teacher.model.n_layer != sparse.model.n_layer:
        return None
    if teacher.tokenizer.get_vocab() != sparse.tokenizer.get_vocab():
        return None
    return least_squares_bridges(teacher.model, sparse.model, spread(teacher.sample))


def unrelated_live(comparison: Comparison, task: str) -> dict[str, Tensor] | None:
    """Live channels of the sparse model's own circuit of a task, by site; None where it has none."""
    circuit = comparison.circuits.get((task, SPARSE))
    if circuit is None:
        return None
    layers = {layer_of(location) for location in circuit.nodes}
    return live_channels(circuit.nodes, n_layer=len(layers), d_model=len(circuit.nodes["0.attn.resid_delta"]))


def unrelated_bases(comparison: Comparison, task: str, bridges: Bridges | None) -> dict[str, Tensor] | None:
    """Images of the unrelated student's circuit in the dense stream, by site; None where there are none."""
    live = unrelated_live(comparison, task)
    return None if bridges is None or live is None else bridged_subspace(bridges, live)


def spread(sample: Int[Tensor, "n T1"], limit: int = WINDOWS) -> Int[Tensor, "m T1"]:
    """At most `limit` windows, evenly spread over a sample."""
    return sample[torch.linspace(0, len(sample) - 1, min(limit, len(sample))).round().long()]


@torch.no_grad()
def active_channels(model: Runnable, windows: Int[Tensor, "n T"], *, batch: int = 8) -> dict[str, Tensor]:
    """Channels of a model's residual stream that vary over windows and tokens, by residual site, each a bool (S,).

    Arguments:
        windows: token ids of pretraining text.
        batch: windows per pass.

    Raises `ValueError` for a batch below 1.
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    with evaluating(model):
        for part in batches(windows, batch, model):
            for site, stream in recorded(model, part)[1].items():
                rows = stream.flatten(0, 1).double()
                sums[site] = sums.get(site, 0) + rows.sum(0)
                squares[site] = squares.get(site, 0) + rows.square().sum(0)
    count = windows.numel()
    variances = {site: squares[site] / count - (sums[site] / count).square() for site in sums}
    return {site: variance > ACTIVE**2 * variance.mean() for site, variance in variances.items()}


def random_channels(
    live: Mapping[str, Bool[Tensor, " S"]], active: Mapping[str, Bool[Tensor, " S"]], n: int, *, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Controls: `n` sets of random active channels, at each site as many as are live (or all active ones, if fewer).

    Arguments:
        live: live channels by site.
        active: channels to draw from, by the same sites.
        n: number of sets. seed: of the draw.

    Each set sends every live channel to another channel, the same at all sites, so that the sets overlap across sites
    as the live ones do; where the other one is not active, the site takes the next that is.
    """
    generator = torch.Generator().manual_seed(seed)
    lives = {site: mask.bool().cpu() for site, mask in live.items()}
    actives = {site: active[site].bool().cpu() for site in lives}
    used, pool = (torch.stack(list(masks.values())).any(0).nonzero()[:, 0] for masks in (lives, actives))
    for _ in range(n):
        order = pool[torch.randperm(len(pool), generator=generator)]
        drawn = {}
        for site, mask in lives.items():
            images = torch.zeros_like(mask)
            images[order[: len(used)][mask[used[: len(order)]]]] = True
            first, then = (order[actives[site][order] & chosen[order]] for chosen in (images, ~images))
            drawn[site] = torch.zeros_like(mask)
            drawn[site][torch.cat([first, then])[: int(mask.sum())]] = True
        yield drawn


# --- encode, mask, decode --------------------------------------------------------------------------------------------


def encode_mask_decode(
    bridges: Bridges,
    site: str,
    stream: Float[Tensor, "B T D"],
    mask: Bool[Tensor, " S"],
    means: ResidualMeans,
) -> Float[Tensor, "B T D"]:
    """mean_d + G_i (m * (f_i(h_d) - mean f_i)): the dense stream as told by some of the student's channels.

    Arguments:
        site: residual site i. stream: h_d there.
        mask: m, the channels that get through.
        means: of the dense model, measured with these bridges.

    Raises `ValueError` for a stream longer than the means, and means without those of the encoders.
    """
    length = stream.shape[1]
    deviation = bridges.encode(site, stream) - means.encoded_at(site, length).to(stream)
    out = means.at(site, length).to(stream) + (deviation * mask.to(stream)) @ bridges.decoder_matrix(site).T
    return torch.cat([stream[:, :1], out[:, 1:]], 1) if means.protect_first else out


@torch.no_grad()
def masked_test(
    dense: Runnable,
    batch: TaskBatch,
    bridges: Bridges,
    live: Mapping[str, Bool[Tensor, " S"]],
    means: ResidualMeans,
    *,
    controls: Iterable[Mapping[str, Bool[Tensor, " S"]]] = (),
) -> list[SubspaceTest]:
    """Encode-mask-decode with the live channels, at one residual site at a time, beside all channels as a ceiling.

    Arguments:
        batch: encoded prompts of the task.
        live: live channels by site.
        means: of the dense model, measured with these bridges.
        controls: other sets of channels by the same sites, such as `random_channels`.

    Returns one record per site; its dimension is that of the live channels' images.
    Raises `ValueError` as `encode_mask_decode`.
    """
    batch = batch.to(next(dense.parameters()).device)
    bases = bridged_subspace(bridges, live)
    sets = list(controls)
    found = []
    with evaluating(dense):
        streams = recorded_streams(dense, batch)

        def loss(site: str, mask: Tensor) -> float:
            return task_losses(dense, batch, site, encode_mask_decode(bridges, site, streams[site], mask, means))[0]

        full = task_losses(dense, batch, bridges.sites[-1], streams[bridges.sites[-1]])[0]
        for site, mask in live.items():
            drawn = tuple(loss(site, one[site]) for one in sets)
            found.append(
                SubspaceTest(
                    test="encode_mask_decode",
                    site=site,
                    dimension=bases[site].shape[1],
                    share=bases[site].shape[1] / dense.d_model,
                    variance=variance_share(bases[site], means.covariance[site]),
                    loss=loss(site, mask),
                    loss_full=full,
                    loss_empty=loss(site, torch.zeros_like(mask)),
                    controls={CHANNELS: drawn} if drawn else {},
                    ceiling=loss(site, torch.ones_like(mask)),
                    protect_first=means.protect_first,
                )
            )
    return found
