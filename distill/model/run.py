"""The one run: what a sparse and a dense model offer alike.

A model is a residual stream and 2L sublayers. `Runnable.run` walks the residual sites, hands each to the tap, and
calls the sublayer behind it; the models only say what a sublayer does. Starting, stopping, recording and replacing
need no second forward.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from distill.model.sites import FINAL_SITE, Tap, residual_sites, site_index


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the sublayers of one run share."""

    attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"] | None
    """1 where a key may be seen, 0 at padding; None where nothing is padded."""
    position_ids: Int[Tensor, "B T"]
    """Position of each token in its sequence."""
    cache: Cache | None
    """Keys and values of earlier tokens, extended in place."""
    prepared: Any = None
    """What a model worked out once for all its layers."""


class Runnable(nn.Module):
    """A decoder that can be run, tapped, stopped and started. Shapes: B batch, T tokens, D width, V vocabulary."""

    n_layer: int
    d_model: int
    vocab_size: int
    context: int
    """Longest sequence in tokens."""
    n_head: int
    d_head: int
    has_positions: bool
    """Whether positions are learned, so that the mean of a node depends on the position."""

    @property
    def widths(self) -> dict[str, int]:
        """Channels at each node location, in the order of the run."""
        raise NotImplementedError

    def embed(
        self, tokens: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream at `0.resid_in`."""
        raise NotImplementedError

    def sublayer(
        self, site: str, x: Float[Tensor, "B T D"], context: Context, tap: Tap | None
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after the attention (from `{i}.resid_in`) or the MLP (from `{i}.resid_mid`)."""
        raise NotImplementedError

    def readout(
        self, residual: Float[Tensor, "*rows D"], tokens: Int[Tensor, "*rows"], *, tap: Tap | None = None
    ) -> Float[Tensor, "*rows V"]:
        """Logits from the residual stream at `final_resid`, for any choice of positions."""
        raise NotImplementedError

    def matrices(self) -> dict[tuple[str, str], Float[Tensor, "n_target n_source"]]:
        """The weights that edges are made of [G 2.2], detached, keyed by (source location, target location)."""
        raise NotImplementedError

    def embedding(self) -> Float[Tensor, "V D"]:
        """Token embedding, detached."""
        raise NotImplementedError

    def unembedding(self) -> Float[Tensor, "V D"]:
        """Unembedding, detached."""
        raise NotImplementedError

    def describe(self) -> Mapping[str, Any]:
        """Configuration, as JSON values."""
        raise NotImplementedError

    def prepare(self, x: Float[Tensor, "B T D"], context: Context) -> Any:
        """What all layers need (a mask, say), once per run."""
        return None

    def run(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        tap: Tap | None = None,
        start: str | None = None,
        residual: Float[Tensor, "B T D"] | None = None,
        stop: str | None = None,
        attention_mask: Int[Tensor, "B K"] | Bool[Tensor, "B K"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "B T last"]:
        """The forward pass of the model, or a stretch of it.

        Args:
            tokens: token ids, also where `start` is given (positions and the bigram table need them).
            tap: called at every node location and residual site that the run passes.
            start: residual site to start from; needs `residual`, the stream there. The tap is not handed the start
                site: what `stop` returned there had been handed already.
            residual: the residual stream at `start`.
            stop: residual site to stop at.
            attention_mask: 1 for tokens, 0 for padding, over cached and new tokens.
            position_ids: by default counted on from the cache.
            past_key_values: cache of earlier tokens, extended in place.

        Returns:
            Logits (B, T, V), or the residual stream (B, T, D) at `stop`, after the tap.

        Raises:
            ValueError: for a site that is not there or lies before `start`, one of start and residual without the
                other, a token id outside the vocabulary, or a text longer than the context.
        """
        first, last = self._stretch(start, residual, stop)
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        self._check_tokens(tokens, seen)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embed(tokens, position_ids) if residual is None else residual
        shared = Context(attention_mask=attention_mask, position_ids=position_ids, cache=past_key_values)
        shared = Context(**{**vars(shared), "prepared": self.prepare(x, shared)})
        sites = residual_sites(self.n_layer)
        for index in range(first, last + 1):
            site = sites[index]
            if tap is not None and site != start:
                x = tap(site, x)
            if site == stop:
                return x
            if site != FINAL_SITE:
                x = self.sublayer(site, x, shared, tap)
        return self.readout(x, tokens, tap=tap)

    def _stretch(self, start: str | None, residual: Tensor | None, stop: str | None) -> tuple[int, int]:
        if (start is None) != (residual is None):
            raise ValueError(f"start: got {start!r}, residual {'missing' if residual is None else 'given'}; give both")
        first = 0 if start is None else site_index(start, self.n_layer, field="start")
        last = 2 * self.n_layer if stop is None else site_index(stop, self.n_layer, field="stop")
        if last < first:
            raise ValueError(f"stop: {stop!r} lies before start {start!r}; allowed are that site and later ones")
        return first, last

    def _check_tokens(self, tokens: Tensor, seen: int) -> None:
        if seen + tokens.shape[1] > self.context:
            raise ValueError(f"tokens: {seen + tokens.shape[1]} tokens; the context of this model is {self.context}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens: ids from {int(tokens.min())} to {int(tokens.max())}; the vocabulary of this model has "
                f"{self.vocab_size} (is this the model's own tokenizer?)"
            )

    def fingerprint(self) -> str:
        """SHA-256 over configuration and weights: two models with the same one compute the same."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
