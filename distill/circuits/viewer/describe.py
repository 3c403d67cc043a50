"""A first description of each node, computed from its examples and its weights; what it means is left to people.

For every node: the tokens at its largest and smallest activations, and how strong it is along the text. For a read
(`act_in`) also the tokens whose embedding is largest in its channel; for a write (`resid_delta`), and for neurons and
values through their weights into the residual stream, the tokens whose logits it raises and lowers on its own, by the
gain of the final norm and the unembedding. What later layers make of it is not in that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.circuits.viewer.activations import counted
from distill.model.anatomy import anatomy
from distill.model.run import Runnable
from distill.model.sites import kind_of

STRONGEST = 64
"""Largest activations whose tokens are counted."""
NAMED = 5
"""Tokens named in each list."""
LEAST_SHARE = 0.05
"""Share of the strongest activations from which on a token is named."""
BINS = 8
"""Stretches of the text that the position profile tells apart."""
LEANING = 2.0
"""Ratio of an end of the text to the rest from which on a node is said to lean to it."""
WRITERS = {"mlp.post_act": "mlp.resid_delta", "attn.v": "attn.resid_delta"}
"""Kinds that write into the residual stream by a matrix of weights, and the kind that they write to."""

Ranked = list[tuple[int, float]]


def descriptions(
    model: Runnable,
    nodes: Mapping[str, Bool[Tensor, "width"]],
    values: Float[Tensor, "n T N"],
    windows: Int[Tensor, "n T"],
) -> list[dict[str, Any]]:
    """One description for each node, in the order of `names_of`; tokens are ids.

    Keys: `high`, `low`: [token, share] at the largest and the smallest activations; `profile`: mean size by stretch of
    the text, the largest 1; `reads`: [token, embedding] or None; `raises`, `lowers`: [token, logit per unit] or None.

    Arguments:
        values: activations in the model on `windows`.
    """
    weights = _weights(model, nodes)
    found = []
    place = 0
    for location, mask in nodes.items():
        for channel in mask.nonzero()[:, 0].tolist():
            node = values[..., place]
            reads, moves = weights(location, channel)
            found.append(
                {
                    "high": _at_extremes(node, windows),
                    "low": _at_extremes(-node, windows),
                    "profile": profile(node),
                    "reads": None if reads is None else [*_largest(reads), *_largest(-reads, sign=-1)],
                    "raises": None if moves is None else _largest(moves),
                    "lowers": None if moves is None else _largest(-moves, sign=-1),
                }
            )
            place += 1
    return found


def _weights(model: Runnable, nodes: Mapping[str, Tensor]) -> Any:
    """A function (location, channel) -> (embedding of every token in its channel, logits it moves), None where there
    is no such thing."""
    embedding, unembedding = model.embedding().float().cpu(), model.unembedding().float().cpu()
    gain = anatomy(model).final_norm.gain.float().cpu()
    matrices = {
        (source, target): weight.float().cpu()
        for (source, target), weight in model.matrices().items()
        if kind_of(source) in WRITERS and bool(nodes[source].any())
    }

    def weights(location: str, channel: int) -> tuple[Tensor | None, Tensor | None]:
        kind = kind_of(location)
        if kind.endswith("act_in"):
            return (embedding[:, channel] if channel < model.d_model else None), None
        if kind.endswith("resid_delta"):
            return None, gain[channel] * unembedding[:, channel]
        if kind in WRITERS:
            written = matrices[location, location.removesuffix(kind) + WRITERS[kind]][:, channel]
            return None, unembedding @ (gain * written)
        return None, None

    return weights


def profile(values: Float[Tensor, "n T"]) -> list[float]:
    """Mean size of a node's activation in up to 8 stretches of the text, as shares of the largest."""
    parts = torch.stack([part.abs().mean() for part in values.tensor_split(min(BINS, values.shape[1]), dim=1)])
    return [round(value, 2) for value in (parts / parts.max().clamp_min(1e-30)).tolist()]


def _at_extremes(values: Float[Tensor, "n T"], windows: Int[Tensor, "n T"]) -> Ranked:
    """The tokens at the largest activations above 0, with their shares of these."""
    flat = values.flatten()
    top = flat.topk(min(STRONGEST, len(flat)))
    tokens = windows.flatten()[top.indices[top.values > 0]].tolist()
    return [(token, round(share, 2)) for token, share in counted(tokens)[:NAMED] if share >= LEAST_SHARE]


def _largest(values: Float[Tensor, "V"], sign: int = 1) -> Ranked:
    top = values.topk(min(NAMED, len(values)))
    return [
        (token, sign * float(f"{value:.3g}"))
        for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        if value > 0
    ]


def sentence(description: Mapping[str, Any], texts: Mapping[int, str]) -> str:
    """The description in words. `texts` are the tokens' texts by id."""

    def named(tokens: Ranked, shares: bool = False) -> str:
        return ", ".join(
            f"{shown(texts[token])} ({value:.0%})" if shares else shown(texts[token]) for token, value in tokens
        )

    if not any(description["profile"]):
        return "Zero on all of the held-out text looked at."
    # Tokens below 5% are not named, so there may be none where many different ones share the extremes.
    parts = [f"highest at {named(description['high'][:3], True) or 'no token in particular'}"]
    if description["low"]:
        parts.append(f"lowest at {named(description['low'][:3], True)}")
    parts.append(leaning(description["profile"]))
    if description["raises"]:
        parts.append(f"by itself raises {named(description['raises'][:3])}")
    if description["lowers"]:
        parts.append(f"lowers {named(description['lowers'][:3])}")
    words = "; ".join(part for part in parts if part)
    return words[0].upper() + words[1:] + "."


def leaning(stretches: Sequence[float]) -> str:
    """Whether a node is strong at one end of the text, in words; "" where it is at neither."""
    rest = sum(stretches[1:-1]) / max(len(stretches) - 2, 1)
    if len(stretches) > 2 and stretches[0] > LEANING * rest and stretches[0] > stretches[-1]:
        return "strongest at the start of the text"
    if len(stretches) > 2 and stretches[-1] > LEANING * rest:
        return "strongest at the end of the text"
    return ""


def shown(text: str) -> str:
    """A token's text in quotes, with spaces and line ends to be seen."""
    return "“" + text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") + "”"
