"""What a model makes of the tasks: accuracy and task loss per split, and what is left of it with every node ablated.

A task counts for circuits only where the model does it and something other than the embeddings and the bigram table is
needed for it: `loss_empty`, the task loss with all nodes at their means. Ablated, a model leans to one of the two
answers whatever the prompt, which alone can lift the loss far over chance while the prompts are still told apart; so
the loss is also given after calibration on training prompts, and the lower of the two decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from distill.circuits.ablation import Means
from distill.circuits.answers import CHANCE, answer_difference, calibrate, two_way_loss
from distill.circuits.masks import MaskTap, all_nodes
from distill.circuits.subject import Subject
from distill.circuits.tasks import SPLITS, MisfitError, Task, TaskBatch, encode, spelled
from distill.model.run import Runnable

NEEDS_CIRCUIT = 0.5
"""Task loss with all nodes ablated, in nats, at or below which a task needs no circuit."""
LEVEL = 0.95
"""Share of samples whose confidence interval holds the true value."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over pairs with its 95% confidence interval; pairs are independent, the two members of one are not."""

    mean: float
    low: float
    high: float

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def accuracy(difference: Float[Tensor, " R"]) -> Estimate:
    """Share of prompts whose right answer has the larger logit (equal counts half), with Wilson's interval.

    `difference` is the logit of the right answer minus that of the wrong one, (2n,), clean rows first. The interval
    takes n for the number of observations: the two members of a pair often fall together, so 2n would be too many.
    """
    n = len(difference) // 2
    mean = float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)))
    return Estimate(mean=mean, low=max(0.0, centre - half), high=min(1.0, centre + half))


def loss(difference: Float[Tensor, " R"]) -> Estimate:
    """Task loss in nats, mean over prompts, with a bootstrap interval over pairs (BCa, fixed seed)."""
    each = softplus(-difference.double())
    pairs = each.reshape(2, -1).mean(0).cpu().numpy()
    mean = float(pairs.mean())
    if len(pairs) < 2 or float(np.ptp(pairs)) <= 1e-9 * abs(mean):
        return Estimate(mean=mean, low=mean, high=mean)
    found = stats.bootstrap(
        (pairs,), np.mean, confidence_level=LEVEL, n_resamples=2000, method="BCa", rng=np.random.default_rng(0)
    )
    return Estimate(mean=mean, low=float(found.confidence_interval.low), high=float(found.confidence_interval.high))


@torch.no_grad()
def empty_difference(model: Runnable, batch: TaskBatch, means: Means) -> Float[Tensor, " R"]:
    """Logit of the right answer minus that of the wrong one with every node ablated, per row of the batch.

    Only the embeddings, the unembedding and the bigram table are live; `means` are the ablation values.
    """
    tap = MaskTap(all_nodes(model.widths, keep=False), means.to(next(model.parameters()).device))
    return answer_difference(model, batch, tap).double().cpu()


def evaluate(subject: Subject, task: Task, *, pairs: int = 200, seed: int = 0) -> dict[str, Any]:
    """One task on one model: fit, and per split accuracy and loss with their intervals, loss_empty before and after.

    `pairs` is drawn per split, or as many as it holds. The record is JSON; where the task does not fit the tokenizer
    or the context, `fits` is false, `reason` says why, and there are no splits.
    """
    encoded: dict[str, TaskBatch] = {}
    tokenizer, model = subject.tokenizer, subject.model
    record: dict[str, Any] = {"task": task.name, "chance": {"accuracy": 0.5, "loss": CHANCE}}
    try:
        for split in task.splits:
            n = min(pairs, task.size(split))
            encoded[split] = encode(task, tokenizer, split, n, seed, context=model.context)
    except MisfitError as misfit:
        return {**record, "fits": False, "reason": str(misfit), "splits": {}}
    chosen = (task, *task.others).index(spelled(task, tokenizer))
    record |= {"fits": True, "reason": "", "spelling": chosen, "splits": {}}
    empty = {split: empty_difference(model, batch, subject.means) for split, batch in encoded.items()}
    calibration = calibrate(empty["train"], encoded["train"].orientation) if "train" in encoded else None
    for split, batch in encoded.items():
        after = None if calibration is None else calibration(empty[split], batch.orientation.double())
        record["splits"][split] = _measure(subject, batch) | {
            "empty": float(two_way_loss(empty[split])),
            "empty_calibrated": None if after is None else float(two_way_loss(after)),
        }
    return {**record, "needs_circuit": needs_circuit(record)}


@torch.no_grad()
def _measure(subject: Subject, batch: TaskBatch) -> dict[str, Any]:
    difference = answer_difference(subject.model, batch)
    return {
        "pairs": len(batch) // 2,
        "dropped": batch.dropped,
        "longest": int(batch.last.max()) + 1,
        "aligned": float(batch.aligned.float().mean()),
        "accuracy": accuracy(difference).record(),
        "loss": loss(difference).record(),
    }


def needs_circuit(record: dict[str, Any]) -> bool:
    """Whether the empty model fails on the test split (or the last one there is), also after calibration."""
    splits = record["splits"]
    one = splits.get("test") or list(splits.values())[-1]
    return min(value for value in (one["empty"], one["empty_calibrated"]) if value is not None) > NEEDS_CIRCUIT


def evaluate_all(subject: Subject, tasks: Sequence[Task], *, pairs: int = 200, seed: int = 0) -> dict[str, Any]:
    """`evaluate` for every task, with the model's name and fingerprint: what `--out` holds."""
    bar = tqdm(tasks, desc=f"tasks of {subject.name}", unit="task", delay=2, leave=False)
    records = [evaluate(subject, task, pairs=pairs, seed=seed) for task in bar]
    return {"model": subject.name, "fingerprint": subject.model.fingerprint(), "seed": seed, "tasks": records}


def table(record: dict[str, Any], splits: Sequence[str] = SPLITS) -> str:
    """The record of `evaluate_all` as a table of Markdown, a line per task and split."""
    lines = [
        f"Tasks of {record['model']}. Chance: accuracy 0.500, loss {CHANCE:.3f} nats; [95% intervals over pairs].",
        f"empty: loss with all nodes ablated, as it is / calibrated; * marks a task that needs no circuit "
        f"(either <= {NEEDS_CIRCUIT}).",
        "",
        "| task | fits | split | pairs | longest | accuracy | loss | empty |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in record["tasks"]:
        lines += _rows(one, splits)
    return "\n".join(lines)


def summary(records: Sequence[dict[str, Any]], target: float = 0.15) -> str:
    """Several models side by side: task loss (accuracy) on the test split, in bold where the loss is below `target`.

    A task that needs no circuit in some model is marked by *; the last line counts the tasks below the target that
    need one.
    """
    lines = [
        f"Task loss on the test split (accuracy), in bold below {target}; * marks a task that needs no circuit.",
        "",
        f"| task | {' | '.join(record['model'] for record in records)} |",
        "|---|" + "---|" * len(records),
    ]
    done = [0] * len(records)
    for rows in zip(*(record["tasks"] for record in records), strict=True):
        needed = all(row.get("needs_circuit", True) for row in rows)
        losses = [row["splits"]["test"]["loss"]["mean"] if "test" in row["splits"] else None for row in rows]
        below = [loss is not None and loss < target for loss in losses]
        done = [count + (needed and low) for count, low in zip(done, below, strict=True)]
        cells = (_cell(row, low) for row, low in zip(rows, below, strict=True))
        lines.append(f"| {rows[0]['task']}{'' if needed else ' *'} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| below {target}, needing a circuit | {' | '.join(map(str, done))} |"])


def _cell(row: dict[str, Any], bold: bool) -> str:
    if not row["fits"]:
        return "does not fit"
    if "test" not in row["splits"]:
        return "no test split"
    one = row["splits"]["test"]
    text = f"{one['loss']['mean']:.3f} ({one['accuracy']['mean']:.2f})"
    return f"**{text}**" if bold else text


def _rows(one: dict[str, Any], splits: Sequence[str]) -> Iterator[str]:
    if not one["fits"]:
        yield f"| {one['task']} | no: {one['reason']} | | | | | | |"
        return
    name = one["task"] + ("" if one["needs_circuit"] else " *")
    fits = "yes" if one["spelling"] == 0 else f"yes, spelling {one['spelling'] + 1}"
    for split, row in one["splits"].items():
        if split not in splits:
            continue
        after = "" if row["empty_calibrated"] is None else f" / {row['empty_calibrated']:.3f}"
        yield (
            f"| {name} | {fits} | {split} | {row['pairs']} | {row['longest']} | {_shown(row['accuracy'])} "
            f"| {_shown(row['loss'])} | {row['empty']:.3f}{after} |"
        )
        name = fits = ""


def _shown(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
