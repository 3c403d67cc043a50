"""Watching a circuit while a model generates: a tap on every forward pass of `generate`.

    with LiveWatch(watch, model, action="stop") as live:
        model.generate(ids, stopping_criteria=StoppingCriteriaList([live]))
    live.events                                     # one record per token that was read

The score of a token is known once the model has read it: that of the last token generated comes with the next pass.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import StoppingCriteria

from distill.circuits.watch import Scores, Watch
from distill.model import DenseModel, SparseTransformer
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE, Tap, residual_sites, wants

Action = Literal["log", "stop", "steer"]


@contextmanager
def tapped(model: Runnable, tap: Tap) -> Iterator[None]:
    """Hands what passes in every forward of the model, transformers' `generate` included, to a tap, for a while.

    A sparse model's run gets the tap as it is. A dense model's own modules are hooked: the tap is handed the residual
    sites alone, and what it returns takes effect at `{i}.resid_in` and `final_resid`; at `{i}.resid_mid`, which no hook
    reaches, it is only shown the stream.
    """
    if isinstance(model, SparseTransformer):
        if "run" in vars(model):
            raise ValueError("model: is tapped already; allowed is one tap at a time (chain several into one)")
        object.__setattr__(model, "run", partial(type(model).run, model, tap=tap))
        try:
            yield
        finally:
            object.__delattr__(model, "run")
        return
    if not isinstance(model, DenseModel):
        raise ValueError(f"model: a {type(model).__name__} cannot be tapped; allowed are sparse and dense models")
    family = model.family
    with ExitStack() as stack:
        for site in residual_sites(model.n_layer):
            i = None if site == FINAL_SITE else int(site.split(".")[0])
            if i is None:
                part = model.part(family.final_norm)
            elif site.endswith("resid_in"):
                part = model.hf.get_submodule(f"{family.blocks}.{i}")
            else:
                part = model.part(family.mlp_norm, i)
            hook = partial(_hand, tap, site, not site.endswith("resid_mid"))
            stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hand(
    tap: Tap, site: str, effective: bool, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    x = inputs[0] if inputs else named["hidden_states"]
    found = tap(site, x)
    if not effective or found is x:
        return None
    return ((found, *inputs[1:]), dict(named)) if inputs else ((), {**named, "hidden_states": found})


@dataclass(frozen=True, kw_only=True)
class Event:
    """One token that was read."""

    row: int
    """Sequence of the batch."""
    position: int
    """Place of the token in its sequence, prompt included."""
    strength: float
    lean: float
    """As in `Scores`."""
    flag: bool
    """Whether the signal is above the threshold."""


ANEW = "a live watch follows one generate: enter it anew for the next"


class LiveWatch(StoppingCriteria):
    """A watch that is plugged into `generate` and logs, stops, or steers when its flag rises.

    Arguments:
        watch: of this model.
        model: the sparse model, or the dense model's wrapper (`DenseModel`; call `model.hf.generate`).
        action: log (nothing but `events`), stop (a sequence ends once a token of it is flagged; `generate` pads it
            while others go on if it knows an end-of-text token, else it ends with the last of them), steer (from the
            token after a flag on, `steer` is in force in that sequence).
        steer: a tap, such as `ModelEdit.tap(model)`; over a dense model it may change the residual stream alone, at
            `{i}.resid_in` and `final_resid`.
        prompt: whether flags on the prompt count too.

    One `with` is for one `generate`; a second one in it is refused. With `use_cache=False` a pass reads the earlier
    tokens again, and steers them too. CircuitMismatchError for another model; ValueError for steering without a tap, or
    a tap without steering. Beam search exchanges the sequences of a batch between tokens and is not supported.
    """

    def __init__(
        self, watch: Watch, model: Runnable, *, action: Action = "log", steer: Tap | None = None, prompt: bool = False
    ) -> None:
        if action not in ("log", "stop", "steer"):
            raise ValueError(f"action: got {action!r}, allowed are log, stop, steer")
        if (action == "steer") != (steer is not None):
            raise ValueError(f"steer: got {'a tap' if steer else 'none'} with action {action}; they go together")
        watch.check(model)
        self.watch, self.model, self.action, self.steer, self.prompt = watch, model, action, steer, prompt
        self.wants = frozenset(x for x in ("pre", "norm_scale", "pattern") if wants(steer, x))
        self.gauge = watch.gauge()
        self._read: list[tuple[int, Scores, Tensor]] = []
        self.raised = torch.zeros(0, dtype=torch.bool)
        self._seen = 0
        self._stack = ExitStack()

    def __enter__(self) -> "LiveWatch":
        self._read, self.raised, self._seen = [], torch.zeros(0, dtype=torch.bool), 0
        self._stack.enter_context(tapped(self.model, _Through(self)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, site: str, x: Tensor) -> Tensor:
        """What the tap does at one site: read, and where a flag was raised steer."""
        if len(self.raised) != len(x):
            self.raised = torch.zeros(len(x), dtype=torch.bool)
        if self.steer is not None and bool(self.raised.any()):
            rows = self.raised.to(x.device).view(-1, *[1] * (x.dim() - 1))
            x = torch.where(rows, self.steer(site, x), x)
        if site.rpartition(".")[2] not in self.wants:
            self.gauge(site, x)
            if site == FINAL_SITE and self.gauge.complete:
                self._note(self.gauge.take())
        return x

    def _note(self, values: Float[Tensor, "B T n"]) -> None:
        first, length = self._seen == 0, values.shape[1]
        # With a cache a pass reads one token more, without one the whole text and one more.
        if not first and length not in (1, self._seen + 1):
            raise ValueError(f"generate: a pass reads {length} tokens after {self._seen}; {ANEW}")
        if length > self._seen:
            # Without a cache every pass reads the whole text again.
            values = values[:, self._seen :]
        scores = self.watch.scores(values)
        flags = self.watch.flags(scores)
        # Records are made when somebody asks for them: the pass waits for nothing but the flags.
        self._read.append((self._seen, scores, flags))
        self._seen += values.shape[1]
        if self.prompt or not first:
            self.raised = self.raised | flags.any(1).cpu()

    @property
    def events(self) -> list[Event]:
        """What was read so far, in the order of reading."""
        return [
            Event(row=row, position=start + place, strength=strength, lean=lean, flag=flag)
            for start, scores, flags in self._read
            for row, parts in enumerate(zip(scores.strength, scores.lean, flags, strict=True))
            for place, (strength, lean, flag) in enumerate(zip(*(part.tolist() for part in parts), strict=True))
        ]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  (it asks for a BoolTensor, which is CPU's)
        self, input_ids: Int[Tensor, "B T"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """For `generate`: which sequences have come to their end."""
        if self._seen != input_ids.shape[1] - 1:
            raise ValueError(f"generate: wrote {input_ids.shape[1]} tokens, and {self._seen} were read; {ANEW}")
        if self.action != "stop" or len(self.raised) != len(input_ids):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.raised.to(input_ids.device)


class _Through:
    """The tap of a live watch; what its steering tap wants is wanted too."""

    def __init__(self, live: LiveWatch) -> None:
        self.live, self.wants = live, live.wants

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        return self.live.read(site, x)
