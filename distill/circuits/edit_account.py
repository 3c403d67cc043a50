"""What an edit does: to its task, to every other task, to text, beside random edits of the same size.

Task losses are those at the best scale >= 0 (`statistics.refit`), which is at most chance, ln 2: a mere loss of
contrast does not count, and an edit that turns the answers round is at chance. What another task loses is given as a
share of what the model knew of it, (after - before) / (ln 2 - before); tasks that the model hardly does before the
edit (`DONE`) are listed, and left out of the summary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from distill.circuits.ablation import Means
from distill.circuits.answers import CHANCE, answer_logits
from distill.circuits.editing import Change, Cut, ModelEdit, constants
from distill.circuits.faithfulness.matched import random_sets
from distill.circuits.faithfulness.statistics import refit
from distill.circuits.masks import all_nodes
from distill.circuits.tasks import MisfitError, Task, TaskBatch, encode, logit_difference
from distill.model import DenseModel, SparseTransformer
from distill.model.run import Runnable
from distill.model.sites import Tap, node_name, split_node

DONE = CHANCE / 2
"""A task is one that the model does where its loss at the best scale is below this, in nats."""
NEAREST = 64
"""Edges of nearest activity that a random edge is drawn from."""


@runtime_checkable
class AnyEdit(Protocol):
    """An edit of one model: `ModelEdit`, or one carried over a bridge."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def apply(self, model: Any, /) -> Any: ...

    def tap(self, model: Any, /) -> Tap: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Text:
    """Held-out windows, and which of their targets have nothing to do with the task."""

    tokens: Int[Tensor, "n T1"]
    """Each window has one token more than it has targets."""
    away: Bool[Tensor, "n T"]
    """Targets away from the task."""
    what: str
    """What the other targets are, for tables."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """One model on task, other tasks and text."""

    task: float
    """Task loss at the best scale >= 0, nats per prompt, at most ln 2."""
    plain: float
    """Task loss as it is."""
    accuracy: float
    """Share of prompts on which the right answer is the likelier one."""
    text: float
    """Next-token loss on held-out text, nats per token."""
    away: float
    """The same over the targets away from the task."""
    others: Mapping[str, float]
    """Loss of every other task at its best scale."""

    def lost(self, before: "Measures") -> dict[str, float]:
        """What each task that the model did `before` has lost, as a share of what it knew; below 0 where it gained."""
        return {
            name: (self.others[name] - loss) / (CHANCE - loss) for name, loss in before.others.items() if loss < DONE
        }


class Yardstick:
    """Fixed prompts and text on which models before and after an edit are measured alike."""

    def __init__(self, task: TaskBatch, others: Mapping[str, TaskBatch], text: Text, *, rows: int = 16) -> None:
        self.task, self.others, self.text, self.rows = task, dict(others), text, rows

    @torch.no_grad()
    def measure(self, model: Runnable, tap: Tap | None = None) -> Measures:
        """All measures of a model, or of one under a tap."""
        difference = task_difference(model, self.task, tap)
        text, away = text_losses(model, self.text, tap, rows=self.rows)
        return Measures(
            task=float(refit(difference[None])[0]),
            plain=float(torch.nn.functional.softplus(-difference).mean()),
            accuracy=float((difference > 0).double().mean()),
            text=text,
            away=away,
            others={
                name: float(refit(task_difference(model, batch, tap)[None])[0]) for name, batch in self.others.items()
            },
        )


@torch.no_grad()
def task_difference(model: Runnable, batch: TaskBatch, tap: Tap | None = None) -> Float[Tensor, "n"]:
    """Logit of the right answer minus that of the wrong one, in float64 on the CPU."""
    logits = answer_logits(model, batch, tap).float()
    return logit_difference(logits, batch.to(logits.device)).double().cpu()


@torch.no_grad()
def text_losses(model: Runnable, text: Text, tap: Tap | None = None, *, rows: int = 16) -> tuple[float, float]:
    """Loss over all targets, and over those away from the task, in nats per token."""
    device = next(model.parameters()).device
    losses = []
    for part in text.tokens.split(rows):
        part = part.to(device)
        logits = model.run(part[:, :-1], tap=tap)
        losses.append(cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none").cpu())
    each = torch.cat(losses).view(text.away.shape)
    return float(each.mean()), float(each[text.away].mean())


def away_from_answers(tokens: Int[Tensor, "n T1"], task: TaskBatch) -> Text:
    """Text whose targets are away from the task where they are none of its answer tokens."""
    answers = torch.cat([task.answer, task.other]).unique().cpu()
    return Text(tokens=tokens, away=~torch.isin(tokens[:, 1:], answers), what="the task's answer tokens")


def other_tasks(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, context: int, *, pairs: int, seed: int, split: str
) -> dict[str, TaskBatch]:
    """Batches of those tasks that fit the tokenizer and the context."""
    found = {}
    for task in tasks:
        try:
            found[task.name] = encode(task, tokenizer, split, pairs, seed, context=context)
        except MisfitError:
            continue  # a task that the model's tokens cannot ask is none that it can lose
    return found


# --- the account -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Account:
    """A model before and after an edit, and after random edits of the same size."""

    edit: AnyEdit
    before: Measures
    after: Measures
    random: tuple[Measures, ...]
    away: str
    """What the targets are that `away` leaves out."""
    prompts: int
    """Prompts of the task."""
    tokens: int
    """Targets of the text."""

    def summary(self) -> dict[str, dict[str, float | None]]:
        """The figures of the table by row: before, after, and what random edits come to (median, least, most).

        `lost` and `worst` are None where the model did no other task before the edit.
        """
        rows: dict[str, dict[str, float | None]]
        rows = {"before": self._row(self.before), "after": self._row(self.after)}
        each = [self._row(one) for one in self.random]
        for name, pick in (("random median", median), ("random least", min), ("random most", max)):
            if each:
                columns = {key: [x for row in each if (x := row[key]) is not None] for key in each[0]}
                rows[name] = {key: pick(found) if found else None for key, found in columns.items()}
        return rows

    def _row(self, one: Measures) -> dict[str, float | None]:
        lost = list(one.lost(self.before).values())
        return {
            "task": one.task,
            "accuracy": one.accuracy,
            "text": one.text - self.before.text,
            "away": one.away - self.before.away,
            "lost": sum(lost) / len(lost) if lost else None,
            "worst": max(lost, default=None),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the edit, the summary, and every measure."""
        return {
            "edit": self.edit.to_json(),
            "summary": self.summary(),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "lost": self.after.lost(self.before),
            "random": [asdict(one) for one in self.random],
            "left_out_of_away": self.away,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "done_below": DONE,
        }

    def table(self) -> str:
        """For a person: the summary, then every other task."""
        head = (
            f"{'':14s} {'task loss':>9s} {'accuracy':>9s} {'text':>8s} {'away':>8s} {'others lost':>12s} {'worst':>7s}"
        )
        lines = [
            f"{name:14s} {row['task']:9.3f} {row['accuracy']:9.1%} {row['text']:+8.4f} {row['away']:+8.4f} "
            f"{_share(row['lost']):>12s} {_share(row['worst']):>7s}"
            for name, row in self.summary().items()
        ]
        lost = self.after.lost(self.before)
        others = [
            f"{name:26s} {loss:6.3f} -> {self.after.others[name]:6.3f}  "
            + (f"{lost[name]:+7.1%} of what it knew" if name in lost else "hardly done before the edit")
            for name, loss in self.before.others.items()
        ]
        note = (
            f"task loss at its best scale >= 0 (chance {CHANCE:.3f}), {self.prompts} prompts; text: change of held-out "
            f"loss, nats per token, {self.tokens} targets; away: without {self.away}; others lost: share of what the "
            "model knew of the other tasks, mean and worst"
        )
        return "\n".join([head, *lines, note, *others])


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def account(
    model: SparseTransformer | DenseModel, edit: AnyEdit, controls: Sequence[AnyEdit], yardstick: Yardstick
) -> Account:
    """Measures the model, the edited model, and one edited by each control; edits are in the weights throughout."""
    return Account(
        edit=edit,
        before=yardstick.measure(model),
        after=yardstick.measure(edit.apply(model)),
        random=tuple(yardstick.measure(control.apply(model)) for control in controls),
        away=yardstick.text.what,
        prompts=len(yardstick.task),
        tokens=yardstick.text.away.numel(),
    )


# --- random edits ----------------------------------------------------------------------------------------------------


def random_edits(model: Runnable, edit: ModelEdit, means: Means, count: int, *, seed: int) -> list[ModelEdit]:
    """Edits like this one at random places: as many nodes at every location and as active, changed alike.

    A node is moved as many times its mean |activation| away from its mean as the node that it stands for; a node held
    at 0 stands for one held at 0. Edges are drawn from the same matrix, with sources as active.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = all_nodes(model.widths, keep=False)
    for change in edit.changes:
        location, channel = split_node(change.node)
        nodes[location][channel] = True
    drawn = random_sets(nodes, means, count, generator)
    values = constants(means)
    return [
        replace(
            edit,
            changes=tuple(_moved(edit.changes, one, means, values)),
            cuts=tuple(_other_cuts(model, edit.cuts, means, values, generator)),
        )
        for one in drawn
    ]


def _moved(
    changes: Sequence[Change], nodes: Mapping[str, Tensor], means: Means, values: Mapping[str, Tensor]
) -> list[Change]:
    """The changes at other nodes, the least active standing for the least active of each location."""
    found = []
    for location, mask in nodes.items():
        size = means.magnitude[location]
        here = sorted(
            (change for change in changes if split_node(change.node)[0] == location),
            key=lambda change: float(size[split_node(change.node)[1]]),
        )
        channels = sorted(mask.nonzero()[:, 0].tolist(), key=lambda channel: float(size[channel]))
        for change, channel in zip(here, channels, strict=True):
            old = split_node(change.node)[1]
            away = (change.value - float(values[location][old])) / max(float(size[old]), 1e-12)
            value = float(values[location][channel]) + away * float(size[channel]) if change.value else 0.0
            found.append(replace(change, node=node_name(location, channel), value=value))
    return found


def _other_cuts(
    model: Runnable, cuts: Sequence[Cut], means: Means, values: Mapping[str, Tensor], generator: torch.Generator
) -> list[Cut]:
    taken = {(cut.source, cut.target) for cut in cuts}
    found = []
    matrices = model.matrices() if cuts else {}
    for cut in cuts:
        (source, i), (target, _) = split_node(cut.source), split_node(cut.target)
        size = means.magnitude[source].cpu()
        index = matrices[source, target].cpu().nonzero()
        order = (size[index[:, 1]] - size[i]).abs().argsort(stable=True)
        near = [
            (node_name(source, int(column)), node_name(target, int(row)), int(column))
            for row, column in index[order[: NEAREST + len(taken)]].tolist()
        ]
        free = [one for one in near if one[:2] not in taken] or near
        one = free[int(torch.randint(len(free), (1,), generator=generator))]
        taken.add(one[:2])
        found.append(Cut(source=one[0], target=one[1], value=float(values[source][one[2]]) if cut.value else 0.0))
    return found


# --- the choice of nodes ---------------------------------------------------------------------------------------------


def choose(
    model: SparseTransformer | DenseModel,
    candidates: Sequence[str],
    make: Callable[[Sequence[str]], AnyEdit],
    batch: TaskBatch,
    text: Text,
    *,
    most: int = 8,
    tried: int = 12,
    cost: float = 8.0,
    enough: float = 0.97,
) -> tuple[str, ...]:
    """The nodes (or edges) whose edit takes the task away at little cost, by effect on training prompts.

    First every candidate is edited alone; the `tried` with the highest task loss at the best scale go on. Then one
    after the other is added, each time the one with the highest

        task loss at the best scale - cost * max(0, rise of the loss on text away from the task)

    until the task loss reaches `enough` of chance, `most` are chosen, or none raises this any more. `make` turns names
    into an edit. Text and prompts must not be those of the account. ValueError for no candidates.
    """
    if not candidates:
        raise ValueError("nodes: none of the circuit's can be edited like this exactly; name nodes, or ask for inexact")
    base = text_losses(model, text)[1]

    def loss(names: Sequence[str]) -> float:
        return float(refit(task_difference(model, batch, make(names).tap(model))[None])[0])

    def worth(names: Sequence[str]) -> float:
        return loss(names) - cost * max(0.0, text_losses(model, text, make(names).tap(model))[1] - base)

    alone = {name: loss([name]) for name in candidates}
    rest = sorted(candidates, key=lambda name: -alone[name])[:tried]
    chosen: list[str] = []
    best = -float("inf")
    while rest and len(chosen) < most:
        found = {name: worth([*chosen, name]) for name in rest}
        name = max(found, key=lambda one: found[one])
        if found[name] <= best:
            break
        best = found[name]
        chosen.append(name)
        rest.remove(name)
        if loss(chosen) >= enough * CHANCE:
            break
    return tuple(chosen)
