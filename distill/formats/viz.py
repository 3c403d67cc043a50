"""A circuit as the payload of OpenAI's viewer: `viz/{model}/{task}/{sweep}/{k}/viz_data.pt`.

The viewer shows kept nodes layer by layer, what ablating a node, an edge or a whole sublayer does to the task loss, and
what each node does on text and on the task's prompts. All of this is measured here, on the circuit as this package
runs it (`Circuit.tap`): ablated nodes at their means, no competition with pruned channels. Losses of nodes and edges
are doubled, as in every payload of theirs: they add up both members of a pair.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from distill.artifact import Provenance, fresh_folder
from distill.circuits.answers import answer_difference, frozen, two_way_loss
from distill.circuits.circuit import Circuit
from distill.circuits.edges import EdgeSet, EdgeTap, circuit_tap, edges_between, induced_edge_set
from distill.circuits.masks import MaskTap
from distill.circuits.subject import Subject
from distill.circuits.tasks import Task, TaskBatch, encode
from distill.command import no_type_check
from distill.model.openai import DEFAULTS, PLACES
from distill.model.run import Runnable
from distill.model.sites import FINAL_SITE, chain
from distill.model.torch_file import save_torch
from distill.model.transformer import SparseTransformer

PAYLOAD_FILE = "viz_data.pt"
FRACTIONS = (0.001, 0.01, 0.1, 0.5)
"""Shares of the tokens that examples are drawn from, lowest and highest activations each."""
DOUBLED = 2.0
"""Task losses are stored as the sum over both members of a pair."""
Examples = dict[float, tuple[list[Any], list[Any]]]


@no_type_check  # it checks its values itself, and says what is allowed
@dataclass(frozen=True, kw_only=True)
class VizSettings:
    """What a payload is measured on."""

    pairs: int = 16
    """Pairs of prompts, out of the task's validation split."""
    windows: int = 64
    """Held-out windows that examples of activations are taken from."""
    examples: int = 5
    """Examples at each end of each share; the viewer shows 5."""
    effects: Literal["measured", "linear"] = "measured"
    """Effect of an edge: measured by a run without it, or to first order from the gradients of one run."""
    seed: int = 0
    """Seed of the prompts and of the examples."""

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("windows", 1), ("examples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are {least} and more")
        if self.effects not in ("measured", "linear"):
            raise ValueError(f"effects: got {self.effects!r}; allowed are measured, linear")


def export_viz(
    circuit: Circuit,
    subject: Subject,
    task: Task,
    out: str | Path,
    settings: VizSettings | None = None,
    *,
    sweep: str = "distill",
    command: str,
    overwrite: bool = False,
) -> Path:
    """Writes a payload where the viewer looks for it under `out`, with a manifest beside it. Returns its path.

    Arguments:
        circuit, subject, task: the circuit, its model and its task.
        sweep: what the viewer lists as the pruning method.
        command: what to record as the command that made it.
        overwrite: whether an earlier payload of as many nodes is replaced.

    ValueError as `viz_payload`, ArtifactError for a folder that exists.
    """
    settings = settings or VizSettings()
    folder = Path(out) / "viz" / subject.name / circuit.task / sweep / str(circuit.n_nodes)
    provenance = Provenance(
        kind="circuit",
        command=command,
        config=vars(settings),
        seed=settings.seed,
        data=None,
        extra={"format": "openai/circuit_sparsity", "model": circuit.model, "task": circuit.task},
    )
    with fresh_folder(folder, provenance, replace=overwrite) as place:
        save_torch(place / PAYLOAD_FILE, viz_payload(circuit, subject, task, settings))
    return folder / PAYLOAD_FILE


def viz_payload(circuit: Circuit, subject: Subject, task: Task, settings: VizSettings) -> dict[str, Any]:
    """Everything that the viewer reads, in plain containers and tensors on the CPU.

    CircuitMismatchError for another model than the circuit's, MisfitError (both are ValueErrors) for a task that the
    tokenizer does not fit.
    """
    model = subject.model
    edges = circuit.edge_set(model)
    batch = _by_class(encode(task, subject.tokenizer, "val", settings.pairs, settings.seed, context=model.context))
    kept = {location: mask.nonzero()[:, 0] for location, mask in circuit.nodes.items()}
    with frozen(model):
        losses = _Losses(model, circuit, batch)
        whole = DOUBLED * losses.of(losses.tap())
        importances = {
            "beeg_model_config": their_config(model),
            "loss": DOUBLED * losses.of(None),
            "interv_loss": whole,
            "ch_interv_losses": {place: losses.without_each(place, kept[place]) for place in kept},
            "layer_interv_losses": losses.without_sublayers(),
            "pair_data": _pairs(losses, edges, kept, whole, settings),
            "pair_data_connections": {},
            "task_samples": _on_task(losses, kept),
        }
        samples = _on_text(model, subject.sample[: settings.windows, :-1], kept, settings)
    return {
        "circuit_data": {**kept, FINAL_SITE: torch.zeros(0, dtype=torch.long)},
        "samples": samples,
        "importances": importances,
        "num_total_nodes": sum(model.widths.values()),
        "all_loss": [(0, whole)],
        "prune_config": json.loads(json.dumps(dict(circuit.provenance), default=str)),
    }


def their_config(model: Runnable) -> dict[str, Any]:
    """The model in the words of their configuration, as far as these go; the viewer reads shapes and names from it."""
    shape = {
        "block_size": model.context,
        "vocab_size": model.vocab_size,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "d_head": model.d_head,
        "d_model": model.d_model,
        "d_mlp": model.widths["0.mlp.post_act"],
    }
    if not isinstance(model, SparseTransformer):
        return {**DEFAULTS, **shape}
    a = model.architecture
    back = {ours: theirs for theirs, ours in PLACES.items()}
    more = {
        "bias": a.linear_bias,
        "ln_bias": a.norm_bias,
        "rms_norm": a.norm == "rms",
        "residual_activation_type": a.residual_activation,
        "activation_type": "relu" if a.activation == "relu" else "gelu",
        "afrac": a.topk_fraction,
        "afrac_loctypes": ",".join(back[kind] for kind in a.topk_at),
        "tied_unembed": a.tied_unembedding,
        "enable_bigram_table": a.bigram,
        "d_pos_emb": a.d_position or None,
        "sink": a.sink,
    }
    return {**DEFAULTS, **shape, **more}


def _by_class(batch: TaskBatch) -> TaskBatch:
    """Each pair turned so that the first half of the rows is of one class, as the viewer shows them."""
    n = len(batch) // 2
    first = torch.arange(n) + n * (batch.labels[:n] != 0)
    return batch.select(torch.cat([first, (first + n) % (2 * n)]))


class _Losses:
    """Task losses of a circuit with some of it taken away, in nats per prompt, each from one run."""

    def __init__(self, model: Runnable, circuit: Circuit, batch: TaskBatch) -> None:
        self.model, self.circuit, self.batch = model, circuit, batch

    @torch.no_grad()
    def of(self, tap: Any) -> float:
        return float(two_way_loss(answer_difference(self.model, self.batch, tap)))

    def tap(self, nodes: Mapping[str, Bool[Tensor, "width"]] | None = None, edges: EdgeSet | None = None) -> Any:
        """The circuit, with these nodes or edges of it in place of all."""
        nodes = self.circuit.nodes if nodes is None else nodes
        if edges is None and self.circuit.kept_edges is not None:
            edges = edges_between(self.circuit.kept_edges, nodes)
        return circuit_tap(self.model, nodes, self.circuit.means, edges)

    def without_each(self, location: str, channels: Int[Tensor, "n"]) -> list[float]:
        """For each kept channel the (doubled) loss of the circuit without it."""
        found = []
        for channel in tqdm(channels.tolist(), desc=location, leave=False, delay=2, disable=None):
            mask = self.circuit.nodes[location].clone()
            mask[channel] = False
            found.append(DOUBLED * self.of(self.tap({**self.circuit.nodes, location: mask})))
        return found

    def without_sublayers(self) -> dict[str, float]:
        """For each attention and MLP the loss of the circuit without its nodes; these alone are not doubled."""
        found = {}
        for layer in range(self.model.n_layer):
            for part in ("attn", "mlp"):
                name = f"{layer}.{part}"
                nodes = {
                    location: torch.zeros_like(mask) if location.startswith(f"{name}.") else mask
                    for location, mask in self.circuit.nodes.items()
                }
                found[name] = self.of(self.tap(nodes))
        return found


def _pairs(
    losses: _Losses, edges: EdgeSet, kept: Mapping[str, Tensor], whole: float, settings: VizSettings
) -> list[list[Any]]:
    """For each matrix of the model how the (doubled) loss changes without each of its edges, sources above targets."""
    changes = _linear(losses, edges) if settings.effects == "linear" else _measured(losses, edges, whole)
    found = []
    for (source, target), index in edges.items():
        effect = torch.zeros(len(kept[source]), len(kept[target]))
        at = torch.searchsorted(kept[source], index[1]), torch.searchsorted(kept[target], index[0])
        effect[at] = changes[source, target]
        found.append([effect, kept[source].tolist(), kept[target].tolist(), (source, target)])
    return found


def _measured(losses: _Losses, edges: EdgeSet, whole: float) -> dict[tuple[str, str], Float[Tensor, "n"]]:
    found = {}
    for matrix, index in edges.items():
        changes = []
        for place in tqdm(range(index.shape[1]), desc=" -> ".join(matrix), leave=False, delay=2, disable=None):
            rest = torch.cat([index[:, :place], index[:, place + 1 :]], 1)
            changes.append(DOUBLED * losses.of(losses.tap(edges={**edges, matrix: rest})) - whole)
        found[matrix] = torch.tensor(changes)
    return found


def _linear(losses: _Losses, edges: EdgeSet) -> dict[tuple[str, str], Float[Tensor, "n"]]:
    """Minus the gradient of the loss to how far each edge is open, at open ones: the change to first order."""
    model, circuit = losses.model, losses.circuit
    # Edges between kept nodes that the circuit dropped stay shut; all others are open.
    every = induced_edge_set(model, circuit.nodes)
    gates: dict[tuple[str, str], Tensor] = {}
    kept: dict[tuple[str, str], Tensor] = {}
    for matrix, index in every.items():
        mine = edges[matrix]
        kept[matrix] = torch.isin(index[0] << 32 | index[1], mine[0] << 32 | mine[1])
        gates[matrix] = kept[matrix].float().to(next(model.parameters()).device).requires_grad_()
    tap = chain(MaskTap(circuit.nodes, circuit.means), EdgeTap(model, every, circuit.means, gates))
    loss = DOUBLED * two_way_loss(answer_difference(model, losses.batch, tap))
    used = {matrix: gate for matrix, gate in gates.items() if len(gate)}
    slopes = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    found = {matrix: torch.zeros(int(mine.sum())) for matrix, mine in kept.items()}
    for matrix, slope in zip(used, slopes, strict=True):
        if slope is not None:
            found[matrix] = -slope.detach().cpu()[kept[matrix]]
    return found


# --- what nodes do ---------------------------------------------------------------------------------------------------


class _Keep:
    """A tap that keeps the activations of some channels."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self.kept, self.values = kept, dict[str, Tensor]()

    def __call__(self, site: str, x: Tensor, /) -> Tensor:
        if site in self.kept:
            self.values[site] = x[..., self.kept[site].to(x.device)].detach().float().cpu()
        return x


def _each(
    kept: Mapping[str, Tensor], values: Mapping[str, Tensor], make: Callable[[Tensor], Any]
) -> dict[str, dict[int, Any]]:
    """`make` of the activations (rows, T) of each kept channel, by location and channel."""
    return {
        location: {channel: make(values[location][..., n]) for n, channel in enumerate(channels.tolist())}
        for location, channels in kept.items()
    }


@torch.no_grad()
def _on_task(losses: _Losses, kept: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
    """Prompts, zeros behind them, and what each node of the circuit is there while only the circuit runs."""
    keep = _Keep(kept)
    answer_difference(losses.model, losses.batch, chain(losses.tap(), keep))
    tokens = losses.batch.tokens * losses.batch.attention_mask
    return tokens.cpu(), _each(kept, keep.values, lambda x: x.clone())


@torch.no_grad()
def _on_text(
    model: Runnable, windows: Int[Tensor, "n T"], kept: Mapping[str, Tensor], settings: VizSettings
) -> dict[str, dict[int, Examples]]:
    """Examples of held-out text at low and high activations of each node, while the whole model runs."""
    device = next(model.parameters()).device
    parts: dict[str, list[Tensor]] = {location: [] for location in kept}
    for rows in windows.split(16):
        keep = _Keep(kept)
        model.run(rows.to(device), tap=keep, stop=FINAL_SITE)
        for location, value in keep.values.items():
            parts[location].append(value)
    values = {location: torch.cat(part) for location, part in parts.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    return _each(kept, values, lambda x: _examples(windows, x, settings.examples, generator))


def _examples(
    windows: Int[Tensor, "n T"], x: Float[Tensor, "n T"], examples: int, generator: torch.Generator
) -> Examples:
    """For each of `FRACTIONS` places drawn from its lowest and its highest activations."""
    order = x.flatten().argsort(stable=True)
    found: Examples = {}
    for fraction in FRACTIONS:
        count = max(1, round(fraction * len(order)))
        ends: list[Sequence[int]] = []
        for end in (order[:count], order[-count:]):
            ends.append(end[torch.randperm(count, generator=generator)[:examples]].tolist())
        found[fraction] = (
            [_item(windows, x, place) for place in ends[0]],
            [_item(windows, x, place) for place in ends[1]],
        )
    return found


def _item(windows: Tensor, x: Tensor, place: int) -> tuple[Tensor, Tensor, int]:
    row, position = divmod(place, windows.shape[1])
    return windows[row].cpu().clone(), x[row].clone(), position
