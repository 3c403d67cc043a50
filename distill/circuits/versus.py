"""Two circuits side by side: what they share, whether one does the other's work, and their scorecards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.circuits.answers import two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import finite, said
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.scorecard import CHECKS, Scorecard
from distill.circuits.tasks import TaskBatch
from distill.model.run import Runnable


@dataclass(frozen=True, kw_only=True)
class Versus:
    """A circuit against another one."""

    cards: tuple[Scorecard, Scorecard]
    """Scorecards, the circuit's own first."""
    shared: Mapping[str, float] | None
    """Jaccard index of nodes and of edges, and nodes in both; None for circuits of different models."""
    transfer: Mapping[str, float] | None
    """Task loss in nats per prompt of each circuit on both circuits' prompts; None for different models."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; the scorecards under `circuit` and `against`."""
        return {
            "circuit": self.cards[0].to_json(),
            "against": self.cards[1].to_json(),
            "shared": None if self.shared is None else {name: finite(value) for name, value in self.shared.items()},
            "transfer": None if self.transfer is None else dict(self.transfer),
        }

    def table(self) -> str:
        """Both scorecards in one table, and what the circuits share."""
        one, other = self.cards
        width = max(14, *(len(card.circuit) + 2 for card in self.cards))
        lines = [f"{'':<14}" + "".join(f"{card.circuit:>{2 * width}}" for card in self.cards)]
        for name in one.about["counts"]:
            lines.append(
                f"{name:<14}" + "".join(f"{card.about['counts'][name]:>{2 * width},.0f}" for card in self.cards)
            )
        found = [{check.name: check for check in card.checks} for card in self.cards]
        for name in CHECKS:
            if not any(name in checks for checks in found):
                continue
            cells = [
                f"{_value(checks[name].value)} {checks[name].verdict}" if name in checks else "-" for checks in found
            ]
            lines.append(f"{name:<14}" + "".join(f"{cell:>{2 * width}}" for cell in cells))
        lines += ["", *(f"{card.circuit}: {card.verdict}" for card in (one, other)), ""]
        if self.shared is None or self.transfer is None:
            return "\n".join([*lines, "the circuits are of different models: no node of one is a node of the other"])
        lines.append(", ".join(f"{name.replace('_', ' ')} {said(value)}" for name, value in self.shared.items()))
        return "\n".join([*lines, *(f"loss of {name} {said(value)}" for name, value in self.transfer.items())])


def _value(value: float) -> str:
    return said(value) if math.isfinite(value) else "-"


@torch.no_grad()
def versus(
    cards: Sequence[Scorecard], models: Sequence[Runnable], circuits: Sequence[Circuit], prompts: Sequence[TaskBatch]
) -> Versus:
    """Puts two circuits side by side, each with its scorecard, its model and prompts of its task.

    Circuits of one model are compared node by node, and each is run on the other's prompts. CircuitMismatchError where
    a circuit is not of its model; ValueError unless there are two of each.
    """
    if {len(cards), len(models), len(circuits), len(prompts)} != {2}:
        raise ValueError(f"circuits: got {len(circuits)}; allowed are two, with a scorecard, model and prompts each")
    one, other = circuits
    if one.model != other.model:
        for model, circuit in zip(models, circuits, strict=True):
            circuit.check(model)
        return Versus(cards=(cards[0], cards[1]), shared=None, transfer=None)
    shared = {
        "jaccard_nodes": one.jaccard(other),
        "jaccard_edges": one.edge_jaccard(other, models[0]),
        "nodes_in_both": float(sum(int(mask.sum()) for mask in one.intersection(other).values())),
    }
    transfer = {
        f"{card.circuit} on the prompts of {of.circuit}": _loss(Runs(models[0], circuit), batch)
        for card, circuit in zip(cards, circuits, strict=True)
        for of, batch in zip(cards, prompts, strict=True)
    }
    return Versus(cards=(cards[0], cards[1]), shared=shared, transfer=transfer)


def _loss(runs: Runs, batch: TaskBatch) -> float:
    return float(two_way_loss(runs.difference(batch, runs.ours(batch))))
