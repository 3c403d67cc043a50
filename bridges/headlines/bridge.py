"""Published results on bridges: what a hybrid pass recovers, and steering a dense model by its sparse student."""

import numpy as np

from bridges.figures import new_figure
from bridges.folder import load_bridged
from bridges.headlines.setting import Found, Headline, Setting
from bridges.lineup import bridge_folder
from bridges.steering import NODE, RANDOM, rank_reads, steer
from distill.circuits.tasks import encode

STEERED = ("single_double_quote", "while_return_true")
"""The source's two; where neither is among the tasks, the first two are steered."""
STRENGTHS = tuple(np.linspace(0, 1, 11))
TOP, PAIRS, CONTROLS = 16, 64, 8
RECOVERED = 0.9
"""Share of the dense model's gain over the bigram model that every single switch is to keep."""


def recovered(setting: Setting) -> Found:
    """Share of the dense model's gain over a bigram model that hybrid passes keep, at every single switch.

    As `fit_bridges` measured it when the student was done.
    """
    *_, info = load_bridged(bridge_folder(setting.bridge))
    sites = info.metrics["sites"]
    shares = {way: {site: row[f"recovered_{way}"] for site, row in sites.items()} for way in ("d2s", "s2d")}
    values = [share for row in shares.values() for share in row.values()]
    gap = {key: info.metrics[key] for key in ("dense_ce", "student_ce", "bigram_ce")}
    record = {"shares": shares, **gap, "sites": sites}
    if any(share is None for share in values):
        return Found(ours="the dense model is too close to a bigram model to tell", holds=None, record=record)
    worst = {way: min(row.values()) for way, row in shares.items()}
    errors = {way: [row[f"hybrid_ce_{way}"] / gap["dense_ce"] - 1 for row in sites.values()] for way in shares}
    ours = (
        f"recovered {worst['d2s']:.3f} at the worst switch from dense to sparse, {worst['s2d']:.3f} back; hybrid loss "
        f"up to {max(errors['d2s']):+.1%} and {max(errors['s2d']):+.1%} of the dense model's"
    )
    figure = new_figure(5.4, 3.2)
    axes = figure.subplots()
    for way, label in (("d2s", "dense to sparse"), ("s2d", "sparse to dense")):
        axes.plot(list(sites), list(shares[way].values()), marker="o", label=label)
    axes.axhline(RECOVERED, color="grey", linewidth=1)
    axes.set_ylabel("share of the gain over bigrams kept")
    axes.tick_params(axis="x", rotation=30, labelsize=8)
    axes.legend(fontsize=8)
    return Found(ours=ours, holds=min(values) >= RECOVERED, record=record, figure=figure)


def steering(setting: Setting) -> Found:
    """The dense model's probability of the counterfactual's answer while the student's strongest reads are added."""
    dense, student, bridges = setting.bridged
    results = {}
    for task in [task for task in setting.tasks if task.name in STEERED] or setting.tasks[:2]:
        shape = {"context": student.model.context, "aligned": True}
        train, test = (
            encode(task, student.tokenizer, split, min(PAIRS, task.size(split)), 0, **shape)
            for split in ("train", "test")
        )
        train, test = train.to(setting.device), test.to(setting.device)
        nodes = rank_reads(student.model, train)[:TOP]
        results[task.name] = steer(dense.model, student.model, bridges, test, nodes, STRENGTHS, controls=CONTROLS)
    figure = new_figure(3.6 * len(results), 3.2)
    for axes, (name, one) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for label, runs in one.probability.items():
            for place, run in enumerate(runs):
                axes.plot(one.strengths, run, label=label if place == 0 else None, alpha=1.0 if len(runs) == 1 else 0.4)
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="strength", ylabel="P(counterfactual's answer)")
        axes.legend(fontsize=7)
    moved = [one.probability[NODE][0][-1] > max(run[-1] for run in one.probability[RANDOM]) for one in results.values()]
    rising = [one.monotone > 0.9 for one in results.values()]
    return Found(
        ours="; ".join(f"{name}: {one.line()}" for name, one in results.items()),
        holds=all(moved) and all(rising),
        record={name: one.to_json() for name, one in results.items()},
        figure=figure,
    )


BRIDGE = (
    Headline(
        name="bridges",
        source="[G A.3], ours",
        claim="a student's bridges let activations cross between the models (no value is published)",
        rule=f"at least {RECOVERED} of the gain over a bigram model is kept at every single switch, both ways",
        rerun=recovered,
    ),
    Headline(
        name="steering",
        source="[G Fig. 9]",
        claim="nodes steer the dense model: quote 0.004 to 0.5 at strength 0.08, about 1 by 0.15; while/return 4e-5 to "
        "0.16 at strength 1",
        rule="the probability rises with the strength (rank correlation above 0.9), further than by random directions",
        rerun=steering,
    ),
)
