"""Many node sets in one run are as many runs of one."""

import pytest
import torch

from distill.circuits.ablation import resampled
from distill.circuits.answers import frozen_norms
from distill.circuits.faithfulness import Runs, runs
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.masks import MaskTap
from distill.model.sites import chain


@pytest.fixture
def sets(circuit):
    return [circuit.nodes, *random_sets(circuit.nodes, circuit.means, 4, torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("at_once", [1, 200, 2048])
@pytest.mark.parametrize("kind", ["mean", "resample", "frozen"])
def test_several_sets_share_a_run(circuit, planted, make_prompts, make_windows, sets, monkeypatch, kind, at_once):
    monkeypatch.setattr(runs, "AT_ONCE", at_once)
    batch, mine = make_prompts(4, 5), Runs(planted, circuit)
    means = resampled(planted, make_windows(3)[:, :-1], batch, mine.means, seed=0) if kind == "resample" else mine.means
    norms = frozen_norms(planted, batch) if kind == "frozen" else None
    found = mine.each(batch, sets, means=means, norms=norms)
    for row, nodes in zip(found, sets, strict=True):
        tap = MaskTap(nodes, means)
        alone = mine.difference(batch, mine.logits(batch, tap if norms is None else chain(tap, norms)))
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)
    assert found.unique(dim=0).shape[0] > 1


def test_groups_of_rows_have_draws_of_their_own(circuit, planted, make_prompts):
    batch, mine = make_prompts(4, 5), Runs(planted, circuit)
    groups = torch.tensor([0, 1, 0, 1]).repeat(2)
    draws = iter([torch.zeros, torch.ones] * len(circuit.nodes) + [torch.zeros])
    tap = mine.restored(lambda size: next(draws)(size).bool(), groups)
    found = mine.difference(batch, mine.logits(batch, tap))
    for group, whole in ((0, mine.ours(batch)), (1, mine.full(batch))):
        rows = groups == group
        torch.testing.assert_close(found[rows], mine.difference(batch, whole)[rows], rtol=1e-5, atol=1e-5)
