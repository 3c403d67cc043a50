"""From a circuit to an edited model with its account: the choice of nodes, the edit, the measures, the folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from distill.artifact import MANIFEST, ArtifactError, Provenance, check_free, fresh_folder, read_head, write_record
from distill.circuits.circuit import Circuit
from distill.circuits.code_labels import labelled_code
from distill.circuits.edit_account import (
    Account,
    AnyEdit,
    Text,
    Yardstick,
    account,
    away_from_answers,
    choose,
    other_tasks,
    random_edits,
)
from distill.circuits.editing import OPS, ModelEdit, constants, edge_names, parse_edge, plan
from distill.circuits.settings import require
from distill.circuits.subject import Subject
from distill.circuits.tasks import KINDS, Task, TaskBatch, encode, load_task, task_names
from distill.circuits.training_split import TrainingSplit
from distill.command import no_type_check
from distill.data.sample import save_sample
from distill.model import DenseModel, SparseTransformer

AUTO = "auto"
CHOOSING, LONGEST = 32, 128
"""Windows that nodes are chosen on, and their length in tokens at most; none of them is in the account."""


@no_type_check  # it checks its values itself, and says what is allowed
@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """What to change in a model, and on what the change is judged."""

    op: Literal["ablate", "scale", "clamp", "cut-edges", "add"] = "ablate"
    """ablate (hold at the mean), scale (x -> mean + factor (x - mean)), clamp (hold at --value), cut-edges (an edge
    contributes its source's mean), add (over a bridge: --value units of the node on top of a write)."""
    nodes: tuple[str, ...] = (AUTO,)
    """Names, such as 2.mlp.act_in.145; for cut-edges also SOURCE->TARGET (a node stands for the circuit's edges that
    begin or end there); auto: chosen by effect on training prompts, see `distill.circuits.edit_account.choose`."""
    factor: float | None = None
    """For scale: what is left of a node's deviation; below 0 it is turned round."""
    value: float | None = None
    """For clamp and add: in units of the activation; for scale also what the node is scaled about, none: its mean."""
    directions: Literal["nodes", "contrast"] = "nodes"
    """Over a bridge: every node's own direction, or one per write, what the circuit says of the two classes there
    (`bridges.contrast`; names are then such as 2.mlp.resid_delta@answer)."""
    competition: bool = True
    """Whether a node that is held goes on competing for a slot of AbsTopK."""
    inexact: bool = False
    """Allow changes that weights stand for only roughly (see `distill.circuits.editing`)."""
    most: int = 8
    """Nodes that auto chooses at most."""
    cost: float = 8.0
    """Nats of task loss that auto gives for one nat per token of held-out loss."""
    controls: int = 20
    """Random edits of equal size."""
    pairs: int = 64
    """Pairs of prompts of every task in the account."""
    windows: int = 96
    """Windows of held-out text in the account."""
    away: Literal["answers", "closing_quotes"] = "answers"
    """Targets that the loss away from the task leaves out: the task's answer tokens, on the model's own held-out
    windows; or tokens that close a string, on held-out files of `code`."""
    code: tuple[str, ...] = ("stdlib",)
    """Sources of Python code for closing_quotes, of which the files are taken that the model's training held out."""
    seed: int = 0
    """Seed of prompts, windows of text, choice and random edits."""

    def __post_init__(self) -> None:
        require(self.op in (*OPS, "add"), "op", self.op, ", ".join((*OPS, "add")))
        for name in ("most", "pairs", "windows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        for name in ("controls", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 and more")
        require(math.isfinite(self.cost) and self.cost >= 0, "cost", self.cost, "0 and more")
        require(self.away in ("answers", "closing_quotes"), "away", self.away, "answers, closing_quotes")
        require(self.directions in ("nodes", "contrast"), "directions", self.directions, "nodes, contrast")
        require(AUTO not in self.nodes or len(self.nodes) == 1, "nodes", self.nodes, f"{AUTO} alone, or names")
        for name in ("factor", "value"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), name, value, "finite numbers")


@dataclass(frozen=True, kw_only=True)
class Maker:
    """How names become an edit of one model."""

    candidates: Sequence[str]
    """What auto may choose from."""
    make: Callable[[Sequence[str]], AnyEdit]
    random: Callable[[AnyEdit, int], Sequence[AnyEdit]]
    """Random edits of equal size, by an edit and their number."""


def own_maker(subject: Subject, circuit: Circuit, config: EditConfig) -> Maker:
    """Edits of the circuit's own model. CircuitMismatchError for another one; ValueError for what does not fit."""
    circuit.check(subject.model)
    values = constants(subject.means)
    if config.op == "add":
        raise ValueError("op: got 'add', which is for a dense model behind a bridge; allowed are clamp and scale")
    if config.directions != "nodes":
        raise ValueError(
            f"directions: got {config.directions!r}, which is for a dense model behind a bridge; use nodes"
        )

    def make(names: Sequence[str]) -> ModelEdit:
        options = {"factor": config.factor, "value": config.value, "competition": config.competition}
        return plan(config.op, names, values, inexact=config.inexact, **options)

    edges = edge_names(circuit.edge_set(subject.model)) if config.op == "cut-edges" else []
    every = edges or circuit.node_names
    exact = [name for name in every if config.inexact or make([name]).exact(subject.model)]

    def spread(names: Sequence[str]) -> ModelEdit:
        """With the edges that a node's name stands for."""
        if config.op != "cut-edges":
            return make(names)
        found = [name for name in names if "->" in name]
        ends = {name for name in names if "->" not in name}
        found += [edge for edge in edges if ends & set(parse_edge(edge)) and edge not in found]
        return make(found)

    return Maker(
        candidates=exact,
        make=spread,
        random=lambda edit, count: (
            random_edits(subject.model, edit, subject.means, count, seed=config.seed)
            if isinstance(edit, ModelEdit)
            else ()
        ),
    )


def run_edit(
    subject: Subject, task: Task, config: EditConfig, maker: Maker, split: TrainingSplit | None = None
) -> tuple[SparseTransformer | DenseModel, Account]:
    """The edited model and its account, against prompts and text that the choice of nodes never saw.

    `split` is that of the model's training, which closing_quotes needs.
    """
    model = subject.model
    train, test = (
        encode(task, subject.tokenizer, side, config.pairs, config.seed, context=model.context)
        for side in ("train", "test")
    )
    choosing, judging = _texts(subject, config, test, split)
    names = tuple(config.nodes)
    if names == (AUTO,):
        names = choose(model, maker.candidates, maker.make, train, choosing, most=config.most, cost=config.cost)
    edit = maker.make(names)
    kind = task.kind if task.kind in KINDS else "all"
    rest = [load_task(name) for name in task_names(kind) if name != task.name]
    others = other_tasks(rest, subject.tokenizer, model.context, pairs=config.pairs, seed=config.seed, split="test")
    yardstick = Yardstick(test, others, judging)
    found = account(model, edit, maker.random(edit, config.controls), yardstick)
    return edit.apply(model), found


def _texts(subject: Subject, config: EditConfig, task: TaskBatch, split: TrainingSplit | None) -> tuple[Text, Text]:
    """Text to choose nodes on, and text for the account."""
    if config.away == "answers":
        text = away_from_answers(subject.sample, task)
    else:
        length = min(subject.model.context, LONGEST)
        options = {"length": length, "held": split, "limit": CHOOSING + config.windows, "seed": config.seed}
        code = labelled_code(subject.tokenizer, config.code, **options)
        text = Text(tokens=code.tokens, away=~code.closes[:, 1:], what="tokens that close a string")
    # A third goes to the choice, as far as there are enough.
    order = torch.randperm(len(text.tokens), generator=torch.Generator().manual_seed(config.seed))
    few = min(CHOOSING, (len(order) + 2) // 3)
    parts = order[:few], order[few : few + config.windows]
    if not len(parts[1]):
        raise ValueError(f"windows: only {len(text.tokens)} of held-out text, too few to choose on and to judge by")
    choosing, judging = (replace(text, tokens=text.tokens[part], away=text.away[part]) for part in parts)
    for one in (choosing, judging):
        if not bool(one.away.any()):
            raise ValueError(f"away: every target of some text is one of {text.what}; allowed are texts with others")
    return choosing, judging


def check_out(out: Path, subject: Subject | None = None) -> None:
    """ArtifactError for a folder that is neither free nor holds an earlier edited model, or holds the very one edited.

    Other models may have taken days to train, and stay.
    """
    check_free(out, "model", replace=True)
    if not (out / MANIFEST).is_file():
        return
    extra = read_head(out, "model")["provenance"].get("extra", {})
    if "edited" not in extra:
        raise ArtifactError(f"{out}: holds a model that is no edited one and stays; choose another folder")
    if subject is not None and extra.get("fingerprint") == subject.model.fingerprint() != extra["edited"]:
        raise ArtifactError(f"{out}: holds the very model that is to be edited; choose another folder")


def save_edit(
    out: Path,
    subject: Subject,
    model: SparseTransformer | DenseModel,
    found: Account,
    config: EditConfig,
    provenance: Mapping[str, Any],
    split: TrainingSplit | None = None,
) -> None:
    """Writes the edited model as an ordinary Hugging Face folder, with tokenizer, held-out windows, edit and account.

    A dense model loads by transformers alone. An earlier edited model in the folder is replaced; ArtifactError as
    `check_out` for anything else there.
    """
    check_out(out, subject)
    made = Provenance(
        kind="model",
        command="recipes/edit_circuit.py",
        config={**asdict(config), **provenance},
        seed=config.seed,
        data=subject.means.data,
        extra={
            "edited": subject.model.fingerprint(),
            "fingerprint": model.fingerprint(),
            "from": subject.name,
            "nodes": list(found.edit.names),
            **({} if split is None else {"corpus": split.record()}),
        },
    )
    with fresh_folder(out, made, replace=True) as folder:
        (model.hf if isinstance(model, DenseModel) else model).save_pretrained(folder)
        subject.tokenizer.save_pretrained(folder)
        save_sample(folder, subject.sample, vocab_size=model.vocab_size)
        write_record(folder / "account.json", found.to_json())
