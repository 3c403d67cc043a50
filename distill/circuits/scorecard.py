"""The scorecard of a circuit: every check of faithfulness, and in words what they come to.

No circuit is to be shown without one: a circuit that reaches a small loss may still be an artefact of pruning. The
checks of `FAST` take seconds and run by default; with `full` come those that differentiate or prune again.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from distill.artifact import ArtifactError, read_record, versions, write_record
from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.ablations import ablations
from distill.circuits.faithfulness.adversarial import adversarial
from distill.circuits.faithfulness.check import Check, finite, said, skipped
from distill.circuits.faithfulness.completeness import completeness
from distill.circuits.faithfulness.controls import config_of, control_edges, controls
from distill.circuits.faithfulness.curve import curve
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.faithfulness.minimality import minimality
from distill.circuits.faithfulness.necessity import necessity
from distill.circuits.faithfulness.role import role
from distill.circuits.faithfulness.runs import Runs
from distill.circuits.faithfulness.shift import shift
from distill.circuits.faithfulness.stability import reseeded, stability
from distill.circuits.faithfulness.statistics import corrected
from distill.circuits.faithfulness.stochastic import stochastic
from distill.circuits.faithfulness.sufficiency import sufficiency
from distill.circuits.prune import split_prompts
from distill.circuits.subject import Subject
from distill.circuits.tasks import KINDS, MisfitError, Task, TaskBatch, encode, load_task, task_names
from distill.model.run import Runnable

CHECKS = ("sufficiency", "ablations", "curve", "necessity", "stochastic", "adversarial", "role", "completeness",
          "minimality", "controls", "stability", "shift")  # fmt: skip
"""All checks, in the order of the scorecard."""
FAST = ("sufficiency", "ablations", "necessity", "stochastic", "role", "minimality", "shift")
"""Those that always run."""
ABLE = 0.6
"""Task loss in nats above which a model cannot do another task, so that no damage could be seen on it."""
WINDOWS, LONGEST = 16, 128
"""Windows of text that corpus values are taken from, and their tokens at most."""
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Prompts that pruning never saw, and text, that a circuit is judged on."""

    test: TaskBatch
    """Prompts of the task's test split."""
    corpus: Int[Tensor, "n T1"]
    """Held-out text: windows with one token more than they have targets."""
    shift: TaskBatch | None = None
    """Prompts of its shifted split; None where the task has none."""
    others: Mapping[str, TaskBatch] | None = None
    """Prompts of other tasks, by name, that the model can do."""


@dataclass(frozen=True, kw_only=True)
class Scorecard:
    """What the checks found about one circuit."""

    circuit: str
    """What people call the circuit: its file, or its task and model."""
    model: str
    """Name of the model."""
    task: str
    """Name of the task."""
    checks: tuple[Check, ...]
    """The checks that ran, in the order of `CHECKS`."""
    limits: Limits
    """What they held the circuit against."""
    seed: int
    """Seed of what they drew."""
    about: Mapping[str, Any]
    """The circuit: fingerprint of the model, target, counts, ablation, objective, label."""
    seconds: Mapping[str, float]
    """Wall-clock seconds by check."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the checks that speak against the circuit."""
        return tuple(check.name for check in self.checks if check.flagged)

    @property
    def chances(self) -> dict[str, float]:
        """Chance that the circuit is no better than its controls, by what was tested, corrected for the number of tests
        (Benjamini and Hochberg)."""
        tested = {name: p for check in self.checks for name, p in check.chances.items()}
        return dict(zip(tested, corrected(list(tested.values())), strict=True))

    @property
    def untested(self) -> tuple[str, ...]:
        """Names of the checks that were not run or could not be asked: they speak neither for nor against it."""
        asked = {check.name for check in self.checks if check.verdict != "skipped"}
        return tuple(name for name in CHECKS if name not in asked)

    @property
    def head(self) -> str:
        """The verdict without its reasons: faithful within tested limits, suspicious, artefact, or not tested."""
        if any(check.verdict == "artefact" for check in self.checks):
            return "artefact"
        if self.flags:
            return "suspicious"
        return "faithful within tested limits" if len(self.untested) < len(CHECKS) else "not tested"

    @property
    def verdict(self) -> str:
        """One sentence: faithful within tested limits, suspicious because, or artefact because."""
        if self.flags:
            # The gravest come first.
            order = sorted((check for check in self.checks if check.flagged), key=lambda one: one.verdict == "flag")
            return f"{self.head} because " + "; ".join(f"{check.reason} [{check.name}]" for check in order)
        asked = [check for check in self.checks if check.verdict != "skipped"]
        words = f"{self.head}: {len(asked)} checks, none against it"
        open_ones = [f"{name} (p {p:.2g})" for name, p in self.chances.items() if p > SIGNIFICANT]
        if open_ones:
            words += f"; chance is not excluded for {', '.join(open_ones)}"
        return f"{words}; not tested: {', '.join(self.untested)}" if self.untested else words

    def table(self) -> str:
        """The scorecard for a terminal."""
        counts = ", ".join(f"{value:,.0f} {name.replace('_', ' ')}" for name, value in self.about["counts"].items())
        lines = [f"{self.circuit}: {self.task} in {self.model}, {counts}", f"    {self._made()}", ""]
        lines.append(_line("check", "value", "control", "threshold", "p", "n", "verdict"))
        for check in self.checks:
            numbers = (check.value, check.typical_control, check.threshold, self.chances.get(check.name))
            lines.append(_line(check.name, *map(_number, numbers), str(check.n), check.verdict))
            lines.append(f"    {check.reason}")
        return "\n".join([*lines, "", f"verdict: {self.verdict}"])

    def _made(self) -> str:
        """How the circuit was pruned, without which its size says nothing."""
        about, losses = self.about, self.about.get("losses", {})
        known = [
            f"{name} {about[name]}"
            for name in ("objective", "ablation", "norms", "seed")
            if about.get(name) is not None
        ]
        known += [
            f"validation loss {words}{said(losses[name])}"
            for name, words in (("circuit", ""), ("calibrated", "calibrated "))
            if name in losses
        ]
        return ", ".join([f"pruned to {said(about['target'])} nats", *known, *filter(None, [about.get("label")])])

    def to_json(self) -> dict[str, Any]:
        """What scorecard.json holds."""
        chances = self.chances
        return {
            "circuit": self.circuit,
            "model": self.model,
            "task": self.task,
            "verdict": self.verdict,
            "flags": list(self.flags),
            "untested": list(self.untested),
            "checks": [{**check.to_json(), "p_corrected": chances.get(check.name)} for check in self.checks],
            "about": dict(self.about),
            "limits": asdict(self.limits),
            "seed": self.seed,
            "seconds": dict(self.seconds),
            "versions": versions(),
        }

    def save(self, path: str | Path) -> Path:
        """Writes the scorecard as JSON; returns the path."""
        write_record(path, self.to_json())
        return Path(path)


def _line(name: str, *cells: str) -> str:
    return f"{name:<14}" + "".join(f"{cell:>11}" for cell in cells)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else said(value)


def check_free(path: Path, circuit: Circuit) -> None:
    """Refuses a path where something else lies than an earlier scorecard of this task in this model.

    To be asked before the checks run. ArtifactError, a ValueError, saying what lies there.
    """
    if not path.exists():
        return
    found = read_record(path, what="scorecard")
    if not {"checks", "verdict", "task", "model"} <= set(found):
        raise ArtifactError(f"{path}: is no scorecard and will not be overwritten; choose another folder")
    if (found["task"], found["model"]) != (circuit.task, circuit.model_name):
        raise ArtifactError(
            f"{path}: is the scorecard of a circuit of {found['task']!r} in {found['model']!r} and will not be "
            f"overwritten by that of {circuit.task!r} in {circuit.model_name!r}; choose another folder"
        )


def scorecard(
    subject: Subject,
    task: Task,
    circuit: Circuit,
    *,
    full: bool = False,
    limits: Limits | None = None,
    seed: int = 0,
    name: str = "",
) -> Scorecard:
    """All checks of `FAST`, and with `full` the others, on prompts that pruning never saw.

    `subject` is the circuit's model with its tokenizer and held-out text, `name` what to call the circuit.
    CircuitMismatchError for a circuit of another model, ValueError where the task does not fit the tokenizer.
    """
    limits = limits or Limits()
    evidence = gather(subject, task, limits, seed=seed)
    with frozen(subject.model):
        card = judge(subject.model, circuit, evidence, limits=limits, seed=seed, full=full, name=name)
        if not full:
            return card
        return _pruned_again(card, subject, task, circuit)


def gather(subject: Subject, task: Task, limits: Limits, *, seed: int = 0) -> Evidence:
    """Prompts and text to judge a circuit of `subject` on; the same for every circuit of one task and model."""
    test = test_prompts(subject, task, limits, seed=seed)
    shifted = _encode(subject, task, "shift", limits.pairs, seed) if task.splits.get("shift") else None
    others: dict[str, TaskBatch] = {}
    for other in task_names(task.kind if task.kind in KINDS else "all"):
        if len(others) == limits.other_tasks:
            break
        if task.name.startswith(other) or other.startswith(task.name):
            continue  # itself, a control or a variant of it
        batch = _able(subject, load_task(other), limits.few_pairs, seed)
        if batch is not None:
            others[other] = batch
    sample = subject.sample
    picked = torch.linspace(0, len(sample) - 1, min(WINDOWS, len(sample))).long()
    corpus = sample[picked, : min(LONGEST, subject.model.context) + 1]
    return Evidence(test=test, shift=shifted, others=others, corpus=corpus)


def test_prompts(subject: Subject, task: Task, limits: Limits, *, seed: int = 0) -> TaskBatch:
    """Prompts of the test split, `limits.pairs` pairs or as many as there are; ValueError where there are none."""
    return _encode(subject, task, "test", limits.pairs, seed)


def _encode(subject: Subject, task: Task, split: str, pairs: int, seed: int) -> TaskBatch:
    held = min(pairs, task.size(split))
    return encode(task, subject.tokenizer, split, held, seed, context=subject.model.context)


def _able(subject: Subject, task: Task, pairs: int, seed: int) -> TaskBatch | None:
    """Test prompts of a task, None where it does not fit the tokenizer or the model cannot do it."""
    try:
        batch = _encode(subject, task, "test", pairs, seed)
    except MisfitError:
        return None
    with torch.no_grad():
        loss = float(two_way_loss(answer_difference(subject.model, batch)))
    return batch if loss < ABLE else None


def judge(
    model: Runnable,
    circuit: Circuit,
    evidence: Evidence,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    full: bool = False,
    name: str = "",
) -> Scorecard:
    """The scorecard from prompts that are encoded already: all checks but those that prune again.

    CircuitMismatchError for a circuit of another model.
    """
    limits = limits or Limits()
    runs = Runs(model, circuit)
    test = evidence.test.to(runs.device)
    few = runs.first(test, few_pairs(test, limits))
    fewer = runs.first(test, min(few_pairs(test, limits), limits.control_pairs))
    common: dict[str, Any] = {"limits": limits, "runs": runs}
    drawn = {**common, "seed": seed}
    corpus = evidence.corpus
    todo: dict[str, Callable[[], Check]] = {
        "sufficiency": lambda: sufficiency(model, circuit, test, **drawn),
        "ablations": lambda: ablations(model, circuit, fewer, corpus, **drawn),
        "curve": lambda: curve(model, circuit, few, **common),
        "necessity": lambda: necessity(model, circuit, fewer, others=evidence.others, corpus=corpus, **drawn),
        "stochastic": lambda: stochastic(model, circuit, few, **drawn),
        "adversarial": lambda: adversarial(model, circuit, _next(test, len(few) // 2), few, **drawn),
        "role": lambda: role(model, circuit, few, corpus, **drawn),
        "completeness": lambda: completeness(model, circuit, few, **drawn),
        "minimality": lambda: minimality(model, circuit, few, **common),
        "shift": lambda: _shift(model, circuit, evidence.shift, common),
    }
    done: dict[str, Check] = {}
    seconds: dict[str, float] = {}
    chosen = [check for check in CHECKS if check in todo and (full or check in FAST)]
    for check in tqdm(chosen, desc="checks", unit="check", delay=2, leave=False):
        began = time.perf_counter()
        done[check] = todo[check]()
        seconds[check] = round(time.perf_counter() - began, 2)
    return Scorecard(
        circuit=name or f"{circuit.task}.{circuit.model_name}",
        model=circuit.model_name,
        task=circuit.task,
        checks=tuple(done.values()),
        limits=limits,
        seed=seed,
        about=about(model, circuit),
        seconds=seconds,
    )


def few_pairs(batch: TaskBatch, limits: Limits) -> int:
    """Pairs for checks of hundreds of runs: `few_pairs`, or as many as fit into `few_tokens`, at least 8."""
    longest = batch.tokens.shape[1]
    return min(limits.few_pairs, max(8, limits.few_tokens // (2 * longest)))


def _next(test: TaskBatch, pairs: int) -> TaskBatch:
    """Prompts to fit on: those after the first `pairs` pairs where there are enough, else all that there are."""
    total = len(test) // 2
    return test.take(torch.arange(pairs, 2 * pairs) if total >= 2 * pairs else torch.arange(total))


def _shift(model: Runnable, circuit: Circuit, shifted: TaskBatch | None, common: Mapping[str, Any]) -> Check:
    if shifted is None:
        return skipped("shift", "the task has no shifted split")
    return shift(model, circuit, shifted, **common)


def about(model: Runnable, circuit: Circuit) -> dict[str, Any]:
    """What a size is to be reported with: target, ablation, norms, losses before and after calibration, seed."""
    known, counts = circuit.provenance, circuit.counts(model)
    return {
        "fingerprint": circuit.model,
        "target": circuit.target,
        "counts": {name: value if isinstance(value, int) else finite(value) for name, value in counts.items()},
        "losses": dict(circuit.losses),
        "objective": known.get("config", {}).get("objective"),
        "ablation": known.get("ablation"),
        "norms": known.get("norms"),
        "label": known.get("label", ""),
        "seed": known.get("seed"),
    }


def _pruned_again(card: Scorecard, subject: Subject, task: Task, circuit: Circuit) -> Scorecard:
    """The scorecard with the two checks that prune: controls and stability."""
    model, tokenizer, limits = subject.model, subject.tokenizer, card.limits
    seconds = dict(card.seconds)
    found = {check.name: check for check in card.checks}

    def timed(name: str, check: Callable[[], Check]) -> None:
        began = time.perf_counter()
        found[name] = check()
        seconds[name] = round(time.perf_counter() - began, 2)

    def other_seeds() -> Check:
        others = reseeded(model, task, tokenizer, circuit, subject.sample, seeds=limits.seeds)
        batches = [_encode(subject, task, "test", limits.few_pairs, seed) for seed in range(len(others) + 1)]
        return stability(model, circuit, others, batches, limits=limits)

    def other_rules() -> Check:
        edges = control_edges(model, task, tokenizer, circuit, subject.sample, seed=card.seed)
        deciding = split_prompts(task, tokenizer, config_of(circuit), context=model.context).val
        return controls(model, circuit, edges, n=len(deciding), seed=card.seed, limits=limits)

    timed("controls", other_rules)
    timed("stability", other_seeds)
    return replace(card, checks=tuple(found[name] for name in CHECKS if name in found), seconds=seconds)


def summary(cards: Sequence[Scorecard]) -> str:
    """A row per circuit: size, and which checks speak against it."""
    width = max(len(card.circuit) for card in cards) + 2
    lines = [f"{'circuit':<{width}}{'objective':<11}{'target':>8}{'nodes':>8}{'edges':>8}  flagged"]
    for card in cards:
        counts = card.about["counts"]
        sizes = f"{card.about['target']:>8.3g}{counts['nodes']:>8,.0f}{counts['edges_pruned']:>8,.0f}"
        flagged = f"{len(card.flags)} of {sum(check.verdict != 'skipped' for check in card.checks)}"
        names = f": {', '.join(card.flags)}" if card.flags else ""
        lines.append(
            f"{card.circuit:<{width}}{card.about['objective'] or '-':<11}{sizes}  {flagged}, {card.head}{names}"
        )
    return "\n".join(lines)
