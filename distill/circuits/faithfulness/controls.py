"""Controls: would pruning have found as small a circuit for a rule the model does not follow, or in a model of noise?

Pruning chooses among very many node sets. If it finds a circuit of the same size for answers that have nothing to do
with the prompts, or in a model whose weights were dealt anew, then a small circuit says little about the model.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.circuits.ablation import Means, node_means
from distill.circuits.circuit import Circuit
from distill.circuits.faithfulness.check import Check, Verdict, skipped
from distill.circuits.faithfulness.limits import Limits
from distill.circuits.prune import PruneConfig, prune
from distill.circuits.selection import TargetError
from distill.circuits.tasks import Task, nonsense
from distill.model.run import Runnable

SPARED = ("bigram", "norm", "sink")
"""Parameters that are left as they are: outside the zero pattern, and no weights of edges."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What pruning came to for a control."""

    edges: int | None
    """Edges of the control's circuit; None where the loss was out of reach."""
    real: int
    """Edges of the task's own circuit in the model, pruned and judged in the same way."""

    @property
    def ratio(self) -> float:
        """Edges of the control over those of the real circuit; infinite where the loss was out of reach."""
        return math.inf if self.edges is None else self.edges / max(self.real, 1)


def controls(
    model: Runnable,
    circuit: Circuit,
    found: Mapping[str, Control],
    *,
    n: int,
    seed: int | None = None,
    limits: Limits | None = None,
) -> Check:
    """The smallest ratio of a control's number of edges to the real circuit's, both pruned to the same loss.

        value = min over controls of edges(control) / edges(real)

    `found` has the controls by name (`control_edges`); one whose loss is out of reach speaks for the circuit. `n` is
    the number of prompts that decided what was kept. Suspicious below `control_suspicious`, an artefact below
    `control_artefact`; skipped without controls. CircuitMismatchError for a circuit of another model.
    """
    limits = limits or Limits()
    if not found:
        return skipped("controls", "no control was pruned")
    nearest = min(found, key=lambda name: found[name].ratio)
    value = found[nearest].ratio
    verdict: Verdict = "pass"
    if value < limits.control_suspicious:
        verdict = "artefact" if value < limits.control_artefact else "flag"
    if math.isinf(value):
        reason = f"the loss is out of reach for {' and for '.join(found)}"
    else:
        nearby = found[nearest]
        reason = f"{nearest} takes {nearby.edges} edges, the task {nearby.real}: {value:.2g} times as many"
    sizes = {f"edges_{name}": math.inf if one.edges is None else float(one.edges) for name, one in found.items()}
    return Check(
        name="controls",
        value=value,
        control=tuple(float(one.edges) for one in found.values() if one.edges is not None),
        threshold=limits.control_suspicious,
        verdict=verdict,
        reason=reason,
        n=n,
        seed=seed,
        details={
            "edges": float(edges_of(model, circuit)),
            **sizes,
            **{f"edges_beside_{name}": float(one.real) for name, one in found.items()},
        },
    )


def edges_of(model: Runnable, circuit: Circuit) -> int:
    """Number of edges of a circuit, after its edge stage where it had one."""
    return int(circuit.counts(model)["edges_pruned"])


def config_of(circuit: Circuit, seed: int | None = None) -> PruneConfig:
    """How a circuit was pruned, to prune something else to the same loss in the same way; with another seed if given.

    Settings that the circuit's file does not know take their defaults.
    """
    known = {field.name for field in fields(PruneConfig)}
    kept = {name: value for name, value in circuit.provenance.get("config", {}).items() if name in known}
    goal = kept.get("goal")
    config = PruneConfig(
        **{
            **kept,
            "target": circuit.target,
            "relative": False,
            "goal": None if goal is None else min(goal, circuit.target),
        }
    )
    return config if seed is None else replace(config, seed=seed)


def control_edges(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    circuit: Circuit,
    corpus: Int[Tensor, "n T1"],
    *,
    seed: int = 0,
) -> dict[str, Control]:
    """Prunes the controls of a circuit to the circuit's loss, as it was pruned itself.

    `a nonsense rule` is the task's contrast answered by unrelated words, in the same model. It is judged calibrated
    (scale >= 0), as nothing ever taught the model how sure to be of such answers, and held against the task pruned and
    judged alike. `redrawn weights` is the task itself in a model whose weights are dealt anew over the same zeros
    (`redrawn`, with `seed`), with ablation values of its own from `corpus`.
    """
    config = config_of(circuit)
    own, windows = edges_of(model, circuit), corpus[:, :-1]
    judged = replace(config, calibrated=True)
    found = {
        "a nonsense rule": Control(
            edges=_edges(model, nonsense(task), tokenizer, circuit.means, judged, windows), real=own
        )
    }
    if found["a nonsense rule"].edges is not None and not config.calibrated:
        real = _edges(model, task, tokenizer, circuit.means, judged, windows)
        found["a nonsense rule"] = replace(found["a nonsense rule"], real=own if real is None else real)
    noise = redrawn(model, seed)
    means = node_means(noise, windows)
    found["redrawn weights"] = Control(edges=_edges(noise, task, tokenizer, means, config, windows), real=own)
    return found


def _edges(
    model: Runnable,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    means: Means,
    config: PruneConfig,
    windows: Int[Tensor, "n T"],
) -> int | None:
    """Edges of a circuit pruned anew; None where the loss is out of reach."""
    try:
        return edges_of(model, prune(model, task, tokenizer, means, config, corpus=windows))
    except TargetError:
        return None


@torch.no_grad()
def redrawn(model: Runnable, seed: int) -> Runnable:
    """A copy of a model with its non-zero weights dealt anew within each matrix, zeros where they were.

    Embedding and unembedding are dealt too; biases, norm gains, sinks and bigram table stay.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = copy.deepcopy(model)
    for name, parameter in noise.named_parameters():
        if parameter.dim() < 2 or any(part in name for part in SPARED):
            continue
        flat = parameter.detach().flatten()
        places = flat.nonzero()[:, 0]
        order = torch.randperm(len(places), generator=generator).to(places.device)
        flat = flat.index_copy(0, places, flat[places[order]])
        parameter.copy_(flat.view_as(parameter))
    return noise
