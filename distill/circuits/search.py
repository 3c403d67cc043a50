"""One search for circuits: the steps of pruning on the prompts of one task, for one goal after another.

`prune` takes the steps once, `pareto` for a row of targets, each from where the last one ended. In the order of the
code:
screen, learn, discretise, clean up nodes and edges, verify.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distill.circuits.ablation import Means
from distill.circuits.answers import check_finite
from distill.circuits.attribution import attribute
from distill.circuits.controllers import Controller, new_controller
from distill.circuits.edges import EdgeSet, edge_total, edges_between, induced_edge_set
from distill.circuits.estimators import as_groups, as_nodes, new_masks
from distill.circuits.judge import SMALL, Judge
from distill.circuits.masks import Nodes
from distill.circuits.objectives import Objective, ablation_means, observe, restorations
from distill.circuits.selection import TargetError, discretise, first, ranking, smallest
from distill.circuits.settings import Goal, PruneConfig
from distill.circuits.tasks import TaskBatch
from distill.circuits.thinning import clean_up_edges, thin_out, trim_dangling
from distill.model.run import Runnable

DRAWS = 8
"""Random restorations that node sets are judged under, one for each pair of prompts in turn."""
FAR = 6
"""Multiple of the masks that are on from which on a goal counts as far off."""
Spent = Callable[[], float]
"""Share of the time there is that has passed; a stage ends at 1."""
Part = tuple[Tensor, EdgeSet | None]
"""Groups of nodes, and which of the edges between them; None for all."""


def never() -> float:
    """The share of an unlimited time."""
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """A circuit as a search finds it: groups of nodes, edges, and how many nodes there were before the clean-up."""

    kept: Tensor
    edges: EdgeSet | None
    goal: Goal
    nodes_before: int
    verified: bool


class Search:
    """A model, the prompts of a task, the masks that are learned on them, and the judges of what is found.

    The model's weights should have no gradients (`answers.frozen`) as long as the search goes on.
    """

    def __init__(
        self,
        model: Runnable,
        train: TaskBatch,
        val: TaskBatch,
        verify: TaskBatch | None,
        means: Means,
        config: PruneConfig,
        corpus: Int[Tensor, "n T"] | None = None,
    ) -> None:
        check_finite(model, val, rows=config.rows)
        self.model, self.config = model, config
        self.masks = new_masks(model, config)
        self.total = int(self.masks.count.sum())
        self.means = ablation_means(model, train, means, config).to(self.masks.tau.device)
        prompts = [
            None
            if batch is None
            else observe(model, batch, self.means, config, corpus=corpus, seed=config.seed + place)
            for place, batch in enumerate((train, val, verify))
        ]
        assert prompts[0] is not None and prompts[1] is not None
        self.train = prompts[0]
        self.judge = Judge(model, self.masks, prompts[1], config)
        self.second = None if prompts[2] is None else Judge(model, self.masks, prompts[2], config)
        self.objective = Objective(model, self.masks, config)
        self.order = _Order(len(train) // 2, config.pairs, config.seed)
        self.controller: Controller | None = None
        self.scores = self.masks.scores()
        if config.objective == "faithful":
            self._restore()

    def screen(self, goal: Goal) -> None:
        """Starts the masks at `start_room` times the smallest circuit that attribution alone finds for the goal.

        Under the attribution estimator its ranking is what there is.
        """
        config = self.config
        order = _Order(len(self.train) // 2, config.pairs, config.seed)
        batches = [self.train.take(order.next()) for _ in range(config.screen)]
        method = config.attribution if config.estimator == "attribution" else "integrated"
        self.scores = attribute(self.model, batches, self.masks, method=method)
        if config.estimator == "attribution":
            return
        alone = Goal(task=goal.task)
        count = smallest(self.scores, lambda kept: self.judge.meets(kept, alone), refine=False)
        on = len(self.scores) if count is None else min(len(self.scores), round(config.start_room * count))
        self.masks.start(self.scores, on, config.start_spread)

    def learn(self, goal: Goal, steps: int, spent: Spent = never) -> None:
        """Learns the masks for some steps [G A.5], with the price as it was left by an earlier call.

        The last of the steps run the nodes alone that are still in question (`PruneConfig.shrink`), with a course of
        the rate of their own.
        """
        config = self.config
        if config.estimator == "attribution":
            return
        price = getattr(self.controller, "price", None)
        self.controller = new_controller(config, goal, self.total, price=price)
        able = self.limit is None and self.judge.separable
        whole = steps - round(config.shrink * steps) if able else steps
        self._learn(self.controller, 0, whole, steps, spent)
        if whole < steps:
            self._narrow(goal)
            self._learn(self.controller, whole, steps, steps, spent)
        self.scores = self.masks.scores()
        if config.objective == "faithful":
            self._restore()

    def _learn(self, controller: Controller, start: int, stop: int, steps: int, spent: Spent) -> None:
        """Some of the steps, as many as there is time for."""
        config = self.config
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW([self.masks.tau], lr=config.rate, betas=betas, weight_decay=config.weight_decay)
        for step in range(start, stop):
            at = max(step, spent() * steps)
            if at >= stop:
                return
            share = (at - start) / (stop - start)
            optimizer.param_groups[0]["lr"] = config.rate * _rate(share, config.warmup, 1 / (stop - start))
            mask, count = self.masks.sample()
            losses = self.objective.losses(self.train.take(self.order.next()), mask)
            optimizer.zero_grad()
            controller.objective(losses, count).backward()
            torch.nn.utils.clip_grad_norm_([self.masks.tau], config.grad_clip)
            optimizer.step()
            self.masks.clamp()
            self.objective.ascend()
            found = {name: float(loss.detach()) for name, loss in losses.items()}
            controller.update(found, float(count.detach()), at / steps)

    def _narrow(self, goal: Goal) -> None:
        """Takes out for good what is far from being needed, where little enough is left to be a module of its own."""
        scores = self.masks.scores()
        on = int((scores > 0).sum())
        count = smallest(scores, lambda kept: self.judge.meets(kept, goal))
        # Where the goal is far off, what validation prompts ask for says little.
        count = on if count is None or count > FAR * on else max(on, count)
        kept = first(ranking(scores), round(self.config.candidates * count)) & self.masks.open
        if 0 < int(self.masks.count[kept].sum()) <= SMALL * self.total:
            self.masks.close(~kept)
            self.objective.narrow(kept, self.train)

    def _restore(self) -> None:
        """Fixes what both judges restore, the worst restoration as learning left it."""
        for place, judge in enumerate((self.judge, self.second)):
            if judge is not None:
                judge.restored = restorations(self.objective.worst, draws=DRAWS, seed=self.config.seed + place)

    def discretise(self, goals: list[Goal]) -> tuple[Bool[Tensor, "groups"], Goal]:
        """The best-scored groups, as few as meet the first goal that can be met, and that goal.

        TargetError naming the best loss seen where the last goal is not met.
        """
        seen: dict[int, float] = {}

        def meets(kept: Tensor, goal: Goal) -> bool:
            done = self.judge.meets(kept, goal)
            seen[int(kept.sum())] = self.judge.last
            return done

        found = discretise(self.scores, goals, meets)
        if found is None:
            closest, best = min(seen.items(), key=lambda item: item[1])
            nodes = int(self.masks.count[first(ranking(self.scores), closest)].sum())
            raise TargetError(
                f"target: {goals[-1].task:.4g} nats is out of reach: the full model has {self.judge.full():.4g}, "
                "the best "
                f"circuit found {best:.4g} with {nodes} nodes; give a higher target, a relative one, or more steps"
            )
        return found

    def clean_up(self, kept: Bool[Tensor, "groups"], goal: Goal, spent: Spent = never) -> list[Tensor]:
        """Removes further groups as long as the goal is met; every set that did, the smallest last."""
        path = [kept]
        self.judge.narrow(kept)

        def meets(trial: Tensor) -> bool:
            done = self.judge.meets(trial, goal)
            if done:
                path.append(trial)
                self.judge.shrink(trial)
            return done

        thin_out(kept, lambda kept: self.judge.importance(kept, goal), meets, runs=self.config.clean_up, spent=spent)
        return path

    def clean_up_edges(self, kept: Bool[Tensor, "groups"], goal: Goal, spent: Spent = never) -> list[Part]:
        """Removes edges as long as the goal is met, then what hangs loose; every part that met it, the smallest last.

        The first one is `kept` with all of its edges.
        """
        nodes, before, budget = as_nodes(self.masks, kept), self.judge.runs, self.config.edge_clean_up
        start = induced_edge_set(self.model, nodes)
        path: list[Part] = [(kept, None)]
        if not budget or not edge_total(start):
            return path

        def meets(kept: Tensor, edges: EdgeSet) -> bool:
            done = self.judge.meets(kept, goal, edges)
            if done:
                path.append((kept, edges))
            return done

        edges = clean_up_edges(
            start,
            lambda edges: self.judge.edge_importance(kept, edges),
            lambda edges: meets(kept, edges),
            runs=budget,
            spent=spent,
        )

        def without(nodes: Nodes, _: EdgeSet) -> bool:
            # Masks that a tied pair shares stay as long as one of the two is in use.
            used = as_groups(self.masks, nodes) > 0
            return meets(used, edges_between(edges, as_nodes(self.masks, used)))

        left = max(1, budget - (self.judge.runs - before))
        trim_dangling(self.model, nodes, edges, without, runs=left, spent=spent)
        return path

    def verified(self, path: Sequence[Part], target: float) -> tuple[Part, bool]:
        """The last part on the way of a clean-up that meets the target on the second held-out prompts, and whether
        there is one.

        Without second prompts, and where no part does, the last one.
        """
        if self.second is None:
            return path[-1], False
        goal = Goal(task=target, faithful=self.limit)
        for kept, edges in reversed(path):
            if self.second.meets(kept, goal, edges):
                return (kept, edges), True
        return path[-1], False

    @property
    def limit(self) -> float | None:
        """The limit of the faithful objective, where it is asked for."""
        return self.config.faithful_limit if self.config.objective == "faithful" else None

    def find(self, goals: list[Goal], target: float, spent: Spent = never, lap: Callable[[str], object] = str) -> Found:
        """From scores to a circuit: discretise, clean up nodes, verify, clean up edges.

        `goals` come the strictest first. TargetError where the last is not met.
        """
        kept, goal = self.discretise(goals)
        lap("discretise")
        return self.finish(kept, goal, target, int(self.masks.count[kept].sum()), spent, lap)

    def finish(
        self,
        kept: Bool[Tensor, "groups"],
        goal: Goal,
        target: float,
        nodes_before: int,
        spent: Spent = never,
        lap: Callable[[str], object] = str,
    ) -> Found:
        """From a set that meets a goal to a circuit: clean up nodes, verify, clean up edges."""
        (kept, _), _ = self.verified([(kept, None) for kept in self.clean_up(kept, goal, spent)], target)
        lap("clean_up")
        (kept, edges), verified = self.verified(self.clean_up_edges(kept, goal, spent), target)
        lap("clean_up_edges")
        return Found(kept=kept, edges=edges, goal=goal, nodes_before=nodes_before, verified=verified)

    def size(self, found: Found) -> int:
        """Number of edges of a circuit."""
        edges = found.edges
        return edge_total(induced_edge_set(self.model, as_nodes(self.masks, found.kept)) if edges is None else edges)


def _rate(progress: float, warmup: float, step: float) -> float:
    """Share of the peak rate: up over `warmup`, then linearly down to 0 at the end."""
    if progress < warmup:
        return (progress + step) / (warmup + step)
    return (1 - progress) / (1 - warmup)


class _Order:
    """Pairs for one step after another: a shuffled pass over all of them, then another."""

    def __init__(self, total: int, batch: int, seed: int) -> None:
        self.total, self.batch = total, min(batch, total)
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.long)

    def next(self) -> Int[Tensor, "pairs"]:
        if len(self.left) < self.batch:
            self.left = torch.randperm(self.total, generator=self.generator)
        chosen, self.left = self.left[: self.batch], self.left[self.batch :]
        return chosen
