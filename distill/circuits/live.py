"""Watching a circuit while a model generates: a tap on every forward pass of `generate`.

    with LiveWatch(watch, model, action="stop") as live:
        model.generate(ids, stopping_criteria=StoppingCriteriaList([live]))
    live.events                                     # one record per token that was read

The score of a token is known once the model has read it: that of the last token generated comes with the next pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, StoppingCriteria

from distill.circuits.watch import Scores, Watch
from distill.model import DenseModel, SparseTransformer
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE, Tap, residual_sites, wants

Action = Literal["log", "stop", "steer"]
Before = Callable[[Tensor, Cache | None, Tensor | None], None]
"""What is told of a pass before it begins: its tokens, the cache of earlier ones, the attention mask."""


@contextmanager
def tapped(model: Runnable, tap: Tap, before: Before | None = None) -> Iterator[None]:
    """Hands what passes in every forward of the model, transformers' `generate` included, to a tap, for a while.

    A sparse model's run gets the tap as it is. A dense model's own modules are hooked: the tap is handed the residual
    sites alone, and what it returns takes effect at `{i}.resid_in` and `final_resid`; at `{i}.resid_mid`, which no hook
    reaches, it is only shown the stream. `before` is called at the beginning of every pass. A sparse model's runs with
    a tap of their own are left alone.
    """
    if isinstance(model, SparseTransformer):
        if "run" in vars(model):
            raise ValueError("model: is tapped already; allowed is one tap at a time (chain several into one)")
        object.__setattr__(model, "run", partial(_run, model, tap, before))
        try:
            yield
        finally:
            object.__delattr__(model, "run")
        return
    if not isinstance(model, DenseModel):
        raise ValueError(f"model: a {type(model).__name__} cannot be tapped; allowed are sparse and dense models")
    family = model.family
    with ExitStack() as stack:
        if before is not None:
            hook = partial(_announce, before)
            stack.callback(model.hf.register_forward_pre_hook(hook, with_kwargs=True).remove)
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


def _run(model: SparseTransformer, tap: Tap, before: Before | None, /, tokens: Tensor, **options: Any) -> Tensor:
    if "tap" in options:  # a run of somebody else's, such as a watch's own
        return type(model).run(model, tokens, **options)
    if before is not None:
        before(tokens, options.get("past_key_values"), options.get("attention_mask"))
    return type(model).run(model, tokens, tap=tap, **options)


def _announce(before: Before, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    tokens = inputs[0] if inputs else named.get("input_ids")
    if tokens is None:
        raise ValueError("generate: got embeddings; a live watch follows tokens, allowed are input_ids")
    before(tokens, named.get("past_key_values"), named.get("attention_mask"))


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

    One `with` is for one `generate`: every pass has to go on where the last one ended, on the text that it read, and
    ValueError is raised where it does not (a second `generate` without `restart`, assisted decoding, which takes tokens
    back, beam search, which exchanges sequences; the last two show only where the watch is handed over as a stopping
    criterion, so do that also where it just logs). Prompts may be read in chunks. With `use_cache=False` a pass reads
    the earlier tokens again, and steers them too. What an attention mask hides (padding) is neither flagged nor logged.
    CircuitMismatchError for another model; ValueError for steering without a tap, or a tap without steering.
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
        self._stack = ExitStack()
        self.restart()

    def restart(self) -> None:
        """Forgets what was read and what was raised: the next pass begins another text."""
        self.raised = torch.zeros(0, dtype=torch.bool)
        self._read: list[tuple[int, Scores, Tensor, Tensor]] = []
        self._text: Tensor | None = None
        self._cache: Cache | None = None
        self._seen, self._fresh, self._writing = 0, 0, False
        self._real = torch.zeros(0, 0, dtype=torch.bool)

    def __enter__(self) -> "LiveWatch":
        self.restart()
        self._stack.enter_context(tapped(self.model, _Through(self), self._begin))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._text = self._cache = None

    def _begin(self, tokens: Int[Tensor, "B T"], cache: Cache | None, mask: Tensor | None) -> None:
        """Before every pass: whether it goes on with the text that was read so far, and with how many tokens."""
        length, past = tokens.shape[1], 0 if cache is None else int(cache.get_seq_length())
        if self._text is None:
            self._seen, self._fresh, self._text = past, length, tokens
            self.raised = torch.zeros(len(tokens), dtype=torch.bool)
        elif past:
            # Behind a cache comes one token, or the next chunk of the prompt.
            if cache is not self._cache or past != self._seen or (length > 1 and self._writing):
                self._refuse(f"a pass reads {length} behind {past}")
            self._fresh, self._text = length, torch.cat([self._text, tokens], 1)
        else:
            if not torch.equal(tokens[:, :-1], self._text):
                self._refuse(f"a pass begins another text of {length}")
            self._fresh, self._text = 1, tokens
        self._cache = cache
        self._real = torch.ones_like(tokens, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
        self._real = self._real[:, -self._fresh :]

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"generate: {what} tokens after {self._seen} were read; a live watch follows one text, call restart() or "
            "enter it anew for the next one"
        )

    def read(self, site: str, x: Tensor) -> Tensor:
        """What the tap does at one site: read, and where a flag was raised steer."""
        if isinstance(self.model, DenseModel) and not self._fresh:
            return x  # its parts are hooked, which `DenseModel.run` calls too; this is no pass of `generate`
        if self.steer is not None and bool(self.raised.any()):
            rows = self.raised.to(x.device).view(-1, *[1] * (x.dim() - 1))
            x = torch.where(rows, self.steer(site, x), x)
        if site.rpartition(".")[2] not in self.wants:
            self.gauge(site, x)
            if site == FINAL_SITE and self.gauge.complete:
                self._note(self.gauge.take())
        return x

    def _note(self, values: Float[Tensor, "B T n"]) -> None:
        scores = self.watch.scores(values[:, -self._fresh :])
        flags = self.watch.flags(scores) & self._real.to(values.device)
        # Records are made when somebody asks for them: the pass waits for nothing but the flags.
        given = not self._read or self._fresh > 1
        self._read.append((self._seen, scores, flags, self._real))
        self._seen, self._fresh = self._seen + self._fresh, 0
        if self.prompt or not given:
            self.raised = self.raised | flags.any(1).cpu()

    @property
    def events(self) -> list[Event]:
        """What was read so far, in the order of reading, without padding."""
        return [
            Event(row=row, position=start + place, strength=strength, lean=lean, flag=flag)
            for start, scores, flags, real in self._read
            for row, parts in enumerate(zip(scores.strength, scores.lean, flags, real, strict=True))
            for place, (strength, lean, flag, there) in enumerate(zip(*(part.tolist() for part in parts), strict=True))
            if there
        ]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  (it asks for a BoolTensor, which is CPU's)
        self, input_ids: Int[Tensor, "B T"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """For `generate`: which sequences have come to their end."""
        read = input_ids[:, :-1]
        if (
            self._text is None
            or self._seen != read.shape[1]
            or not torch.equal(read[:, -self._text.shape[1] :], self._text)
        ):
            self._refuse(f"it goes on with another text, of {input_ids.shape[1]}")
        if not self._writing and not self.prompt:
            # All that was read so far was the prompt, also where its last chunk was a single token.
            self.raised = torch.zeros_like(self.raised)
        self._writing = True
        if self.action != "stop":
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self.raised.to(input_ids.device)


class _Through:
    """The tap of a live watch; what its steering tap wants is wanted too."""

    def __init__(self, live: LiveWatch) -> None:
        self.live, self.wants = live, live.wants

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        return self.live.read(site, x)
