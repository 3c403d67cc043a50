"""Stages of a search: learning goes on with what is still in question; edges go as far as the goal is met, loose ends
bit by bit, and second prompts have a say."""

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.edges import edge_total, induced_edge_set
from distill.circuits.estimators import as_groups, as_nodes
from distill.circuits.masks import MaskTap, NodeMasks
from distill.circuits.search import Search
from distill.circuits.settings import Goal, PruneConfig
from distill.model.sites import chain

GOAL = Goal(task=0.15)
LOOSE = ("0.mlp.act_in.5", "0.mlp.resid_delta.7")


@pytest.fixture
def search(make_planted, make_prompts, make_windows):
    model = make_planted(0, stray=0.1)
    batches = (make_prompts(pairs, seed) for seed, pairs in enumerate((16, 16, 16)))
    with frozen(model):
        yield Search(model, *batches, node_means(model, make_windows()), PruneConfig())


@pytest.fixture
def kept(search, choose, planted_names):
    """The planted nodes, and two that nothing joins."""
    return as_groups(search.masks, choose(search.model, planted_names + LOOSE)) > 0


def names(search, kept):
    return {
        f"{location}.{channel}"
        for location, mask in as_nodes(search.masks, kept).items()
        for channel in mask.nonzero()[:, 0].tolist()
    }


def test_stray_edges_and_loose_ends_go(search, kept, planted_names):
    path = search.clean_up_edges(kept, GOAL)
    assert path[0][1] is None and torch.equal(path[0][0], kept)
    assert names(search, path[-1][0]) == set(planted_names) and edge_total(path[-1][1]) == 4
    assert all(search.judge.meets(part, GOAL, edges) for part, edges in path)


def test_a_loose_end_that_the_goal_needs_stays(search, kept, planted_names, choose, monkeypatch):
    needed = as_groups(search.masks, choose(search.model, LOOSE[:1])) > 0
    monkeypatch.setattr(search.judge, "meets", lambda kept, goal, edges=None: bool(kept[needed].all()))
    monkeypatch.setattr(search.judge, "edge_importance", lambda kept, edges: torch.zeros(edge_total(edges)))
    left, edges = search.clean_up_edges(kept, GOAL)[-1]
    assert names(search, left) == {LOOSE[0]} and edge_total(edges) == 0


def test_without_runs_for_edges_all_of_them_stay(search, kept):
    search.config = PruneConfig(edge_clean_up=0)
    assert search.clean_up_edges(kept, GOAL) == [(kept, None)]


@pytest.mark.parametrize(("least", "verified"), [(0, True), (6, True), (11, False)])
def test_edges_come_back_where_second_prompts_ask_for_them(search, kept, monkeypatch, least, verified):
    total = edge_total(induced_edge_set(search.model, as_nodes(search.masks, kept)))
    assert total == 10

    def meets(kept, goal, edges=None):
        return (total if edges is None else edge_total(edges)) >= least

    monkeypatch.setattr(search.second, "meets", meets)
    found = search.finish(kept, GOAL, 0.15, nodes_before=9)
    assert found.verified is verified
    left = total if found.edges is None else edge_total(found.edges)
    assert left >= least if verified else left == 4


def test_without_second_prompts_nothing_is_verified(search, kept):
    search.second = None
    assert not search.finish(kept, GOAL, 0.15, nodes_before=9).verified


class Behind(MaskTap):
    """Masks that leave AbsTopK alone, behind a tap that does not."""

    def __call__(self, site, x, /):
        return x if site.endswith(".pre") else super().__call__(site, x)


def test_nodes_still_in_question_run_as_in_the_masked_model(search, kept, choose, planted_names):
    luck = torch.Generator().manual_seed(0)
    candidates = kept | (torch.rand(len(kept), generator=luck) < 0.4)
    on = (candidates & (kept | (torch.rand(len(kept), generator=luck) < 0.5))).float()
    on[as_groups(search.masks, choose(search.model, planted_names[-1:])) > 0] = 0
    assert 0 < int(on.sum()) < int(candidates.sum()) < len(kept)
    search.objective.narrow(candidates, search.train)
    alone, masked = on.clone().requires_grad_(), on.clone().requires_grad_()
    found = search.objective.losses(search.train, alone)["task"]
    means = search.train.means
    tap = chain(
        MaskTap(as_nodes(search.masks, candidates), means),
        Behind(search.masks.spread(masked), means, competition=True),
    )
    wanted = two_way_loss(answer_difference(search.model, search.train.batch, tap))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(alone.grad[candidates], masked.grad[candidates], rtol=1e-4, atol=1e-6)
    assert float(alone.grad[candidates & (on == 0)].abs().max()) > 1e-4


def test_nodes_out_for_good_stay_out(search):
    search.config = PruneConfig(start_room=1.0)
    search.screen(GOAL)
    search.learn(GOAL, 20)
    out = ~search.masks.open
    assert search.objective.module is not None and bool(out.any())
    assert float(search.scores[out].max()) < min(0.0, float(search.scores[~out].min()))
    search.learn(GOAL, 4)
    assert not bool((search.masks.open & out).any())
    out = ~search.masks.open
    assert float(search.scores[out].max()) < min(0.0, float(search.scores[~out].min()))


@pytest.mark.parametrize("settings", [{"shrink": 0.0}, {"objective": "faithful"}])
def test_where_the_others_may_come_back_none_is_out(make_planted, make_prompts, make_windows, settings):
    model = make_planted(0)
    batches = (make_prompts(pairs, seed) for seed, pairs in enumerate((16, 16)))
    with frozen(model):
        search = Search(model, *batches, None, node_means(model, make_windows()), PruneConfig(**settings))
        search.learn(Goal(task=0.15, faithful=search.limit), 4)
    assert search.objective.module is None and bool(search.masks.open.all())


@pytest.mark.parametrize("scores", [[0.5, -0.2, 0.9, -1.0], [3.0, 2.0, 4.0, 2.5]])
def test_closed_groups_rank_last_in_their_own_order(scores):
    masks = NodeMasks({"0.mlp.act_in": 4})
    masks.close(torch.tensor([True, False, True, False]))
    ranked = masks.ranked(torch.tensor(scores))
    assert ranked[[1, 3]].tolist() == pytest.approx([scores[1], scores[3]])
    assert ranked[0] < ranked[2] < min(scores[1], scores[3], 0)
    _, count = masks()
    assert count == 2


def test_time_that_is_spent_ends_each_part_of_the_learning(search, monkeypatch):
    seen = []
    losses = search.objective.losses
    monkeypatch.setattr(search.objective, "losses", lambda *given: seen.append(None) or losses(*given))
    search.screen(GOAL)
    # A quarter of the time is gone by the first step, and another one with each step.
    search.learn(GOAL, 40, lambda: 0.25 * (1 + len(seen)))
    assert len(seen) == 3
