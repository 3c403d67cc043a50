"""What the frozen dense model says of the text: computed as the training goes on, or once and read back as a stream.

A step of `bridges.objective` needs of the dense model its residual stream at some sites and what the divergences are
measured from (`Reference`). `LiveTeacher` runs the model. `write_targets` runs it over all steps of a training and
leaves files that `StoredTeacher` reads in the order of the steps: for several trainings on the same text, students of
several widths or sparsities, the model's whole passes are paid for once. Partial passes through the dense model
(`kl_s2d`) still need it.

A folder holds `targets.json` (`TargetPlan`: which model, text and steps) and files of some steps each, safetensors,
with the tokens that they belong to. Files are written one after the other, whole or not at all, so that an interrupted
writing goes on. What is stored is float32, as computed: trainings with stored and with live targets are equal to the
bit, where one process trains.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from bridges.losses import Reference
from bridges.metrics import recorded
from distill.artifact import (
    ArtifactError,
    fingerprint,
    load_tensors,
    lock,
    read_record,
    save_tensors,
    write_record,
)
from distill.data.tokens import Batches
from distill.model.run import Runnable

PLAN_FILE = "targets.json"
FILE_BYTES = 2**26
"""Size that a file of targets stays below, unless one step is larger."""
_KIND = "targets"


@dataclass(frozen=True)
class Seen:
    """What the dense model says of a batch."""

    reference: Reference
    """Of its logits."""
    residuals: Mapping[str, Float[Tensor, "B T D"]]
    """Its residual stream by site, at the sites that the step needs at least."""


@runtime_checkable
class Teacher(Protocol):
    """Where a training gets what the dense model says."""

    def __call__(self, tokens: Int[Tensor, "B T"], step: int, sites: tuple[str, ...]) -> Seen:
        """Of the inputs of a step, or of some rows of them, with the residual streams at `sites`."""
        ...


def arithmetic(device: str, precision: str) -> AbstractContextManager[object]:
    """In which the dense model's passes are made: "bfloat16", "float32", or "training", as what is around them.

    Matrix products are rounded to bfloat16, the residual stream that they add to is not.
    """
    if precision == "training":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


class LiveTeacher:
    """The dense model itself."""

    def __init__(self, dense: Runnable, *, top: int | None, precision: str = "training") -> None:
        """`top` as of `Reference.of`, `precision` as of `arithmetic`."""
        self.dense, self.top, self.precision = dense, top, precision

    # Inference mode would save nothing more, and what it returns cannot be read by what is trained.
    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "B T"], step: int, sites: tuple[str, ...]) -> Seen:
        """As `Teacher`; the step does not matter."""
        with arithmetic(tokens.device.type, self.precision):
            logits, residuals = recorded(self.dense, tokens, sites)
        return Seen(Reference.of(logits, self.top), residuals)


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """Which targets: equal plans give equal targets."""

    dense: str
    """Fingerprint of the dense model."""
    data: str
    """Fingerprint of the text."""
    order: int
    """Seed of the order of the text."""
    batch: int
    """Sequences per step."""
    context: int
    """Tokens per sequence."""
    accumulate: int
    """Parts that a batch is run in."""
    precision: str
    """Of the dense model's passes, as of `arithmetic`."""
    top: int | None
    """Tokens kept apart in the divergences; None: the full vocabulary."""
    sites: str
    """Residual streams of a step: none, "sample" (the site of its partial passes) or "all"."""
    deal: int | None
    """Seed of which site a step samples; None where all sites are there or none is."""
    n_layer: int
    """Layers."""
    d_model: int
    """Channels of the dense residual stream."""
    vocab_size: int
    """Tokens in the vocabulary."""
    steps: int = field(metadata={"at_least": True})
    """Steps of the training; targets of more steps serve too."""

    @property
    def step_bytes(self) -> int:
        """Of the targets of a step."""
        classes = self.vocab_size if self._full else (self.top or 0) + 1
        streams = {"none": 0, "sample": 1, "all": 2 * self.n_layer + 1}[self.sites] * self.d_model
        kept = 0 if self._full else (self.top or 0)
        return self.batch * (self.context * (4 * (classes + kept) + 4 * streams) + 4 * self.context)

    @property
    def _full(self) -> bool:
        return self.top is None or self.top >= self.vocab_size

    @property
    def per_file(self) -> int:
        """Steps in a file."""
        return max(1, FILE_BYTES // self.step_bytes)

    def describe(self) -> str:
        """In a line for people."""
        return f"{self.steps:,} steps of {self.step_bytes:,} bytes, {self.steps * self.step_bytes / 2**30:,.1f} GiB"

    def check(self, folder: Path) -> None:
        """`ArtifactError` that names the field unless the targets in `folder` are these, and of as many steps."""
        saved = read_record(folder / PLAN_FILE, what="target plan")
        for one in fields(self):
            was, now = saved.get(one.name), getattr(self, one.name)
            if "at_least" in one.metadata:
                if not isinstance(was, int) or was < now:
                    raise ArtifactError(f"targets: {folder} holds {one.name} {was!r}, needed are {now}")
            elif was != now:
                raise ArtifactError(f"targets: {folder} holds those of {one.name} {was!r}, needed are those of {now!r}")


def write_targets(
    folder: str | Path, dense: Runnable, batches: Batches, plan: TargetPlan, sites_of: Callable[[int], tuple[str, ...]]
) -> None:
    """Runs the dense model over the steps of a training and writes what it says; goes on where it was interrupted.

    Arguments:
        folder: gets the files.
        dense: in evaluation mode, on its device.
        batches: of the training, from its start.
        plan: what is written.
        sites_of: the sites whose residual stream a step needs, by the step.

    Raises `ArtifactError` where `folder` holds other targets or other files, and `ValueError` where the disk has no
    room for them.
    """
    folder = Path(folder)
    if (folder / PLAN_FILE).is_file():
        plan.check(folder)
        plan = _stored(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"targets: {folder} holds other files; allowed are a new folder, or one of targets")
    with lock(folder):
        missing = [first for first in range(0, plan.steps, plan.per_file) if not _file(folder, first).is_file()]
        if not missing:
            return
        free = shutil.disk_usage(folder).free
        needed = len(missing) * min(plan.per_file, plan.steps) * plan.step_bytes
        if free < needed:
            raise ValueError(f"targets: take {needed / 2**30:,.1f} GiB, {folder} has room for {free / 2**30:,.1f}")
        write_record(folder / PLAN_FILE, asdict(plan))
        live = LiveTeacher(dense, top=plan.top, precision=plan.precision)
        device = next(dense.parameters()).device
        due, tensors = set(missing), dict[str, Tensor]()
        # Streamed text comes step after step only, so the steps that are there already are passed through too.
        for step in tqdm(range(plan.steps), desc="targets", unit="step", disable=None):
            rows, first = batches.rows(step, 0, 1), step - step % plan.per_file
            if first in due:
                tensors |= _step(live, rows, step, sites_of(step), plan, device)
                if step + 1 == min(first + plan.per_file, plan.steps):
                    save_tensors(_file(folder, first), tensors, {"kind": _KIND, "plan": _key(plan)})
                    tensors = {}


def _step(
    live: LiveTeacher, rows: Tensor, step: int, sites: tuple[str, ...], plan: TargetPlan, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a step by name."""
    parts = [live(part[:, :-1].to(device), step, sites) for part in rows.chunk(plan.accumulate)]
    yield f"{step}/tokens", rows[:, :-1].to(torch.int32)
    yield f"{step}/log_p", torch.cat([part.reference.log_p.cpu() for part in parts])
    kept = [part.reference.kept for part in parts]
    if kept[0] is not None:
        yield f"{step}/kept", torch.cat([one.to("cpu", torch.int32) for one in kept if one is not None])
    for site in sites:
        yield f"{step}/{site}", torch.cat([part.residuals[site].cpu() for part in parts])


class StoredTeacher:
    """Targets that `write_targets` left, read a file at a time."""

    def __init__(self, folder: str | Path, plan: TargetPlan) -> None:
        """Raises `ArtifactError` where the folder does not hold the targets of `plan`, or a file of them is missing."""
        self.folder = Path(folder)
        plan.check(self.folder)
        self.plan = _stored(self.folder)
        for first in range(0, plan.steps, self.plan.per_file):
            if not _file(self.folder, first).is_file():
                raise ArtifactError(f"targets: {_file(self.folder, first)} is missing; write them to their end first")
        self._first, self._tensors = -1, dict[str, Tensor]()

    def __call__(self, tokens: Int[Tensor, "B T"], step: int, sites: tuple[str, ...]) -> Seen:
        """As `Teacher`. Raises `ArtifactError` for tokens, sites or steps that the targets are not of."""
        self._open(step)
        missing = [site for site in sites if f"{step}/{site}" not in self._tensors]
        if missing or f"{step}/tokens" not in self._tensors:
            what = f"the stream at {missing[0]}" if missing else "the tokens"
            raise ArtifactError(f"targets: {_file(self.folder, self._first)} does not hold {what} of step {step}")
        # A process has its share of the rows, and a part of a batch some of these.
        same = (self._tensors[f"{step}/tokens"][None] == tokens.cpu()[:, None]).all(-1)
        if not bool(same.any(1).all()):
            raise ArtifactError(f"targets: {self.folder} are of other text than the training has at step {step}")
        rows = same.int().argmax(1)

        def get(name: str) -> Tensor:
            return self._tensors[f"{step}/{name}"][rows].to(tokens.device)

        kept = get("kept").long() if f"{step}/kept" in self._tensors else None
        return Seen(Reference(get("log_p"), kept), {site: get(site) for site in sites})

    def _open(self, step: int) -> None:
        first = step - step % self.plan.per_file
        if first == self._first:
            return
        path = _file(self.folder, first)
        self._tensors, head = load_tensors(path, kind=_KIND)
        if head.get("plan") != _key(self.plan):
            raise ArtifactError(f"targets: {path} belongs to other targets than {PLAN_FILE} beside it describes")
        self._first = first


def _stored(folder: Path) -> TargetPlan:
    """The plan of what lies there, after `check`."""
    saved = read_record(folder / PLAN_FILE, what="target plan")
    values: dict[str, Any] = {one.name: saved.get(one.name) for one in fields(TargetPlan)}
    return TargetPlan(**values)


def _key(plan: TargetPlan) -> str:
    return fingerprint(asdict(plan))


def _file(folder: Path, first: int) -> Path:
    return folder / f"step-{first:08d}.safetensors"
