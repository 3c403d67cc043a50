"""A sorter of six letters, every claim about which can be held to all 729 inputs that it can be given.

    python tests/benchmarks/study_sort.py --model gpt-nano-sort --out sort
    python tests/benchmarks/study_sort.py --model gpt-nano-sort --out sort --circuits runs/sort
    python tests/benchmarks/study_sort.py --model gpt-nano-sort --out sort --circuits runs/student --bridge runs/sorted

The first writes what the recipes need: sort.txt, every input with its answer on a line; three tasks, every pair of
inputs that differ in one letter, the one that decides; and, beside the model, the inputs to take ablation values over.
The second prints, for each saved circuit, what holds on all inputs beside what was seen on the test split. The third
judges a student with its bridges, and interchanges its circuits, on all inputs. recipes/OTHERS.md tells the rest.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bridges import bridge_metrics, live_channels
from bridges.interchange import interchange
from bridges.lineup import load_pair
from bridges.transport import active_channels, random_channels
from distill import Subject, command, encode, load_subject, load_task, load_tokenizer
from distill.artifact import read_json
from distill.circuits import Circuit, MaskTap, all_nodes
from distill.circuits.answers import answer_difference, joined, two_way_loss
from distill.circuits.faithfulness.necessity import without
from distill.circuits.masks import Nodes
from distill.data import save_sample
from distill.model import Tap

LETTERS, LENGTH = "ABC", 6
TASKS = {"sort_first": (0, "AB"), "sort_third": (2, "AB"), "sort_last": (5, "BC")}
"""Letter of the answer that is asked for, and the two that it may be."""
SPLITS = ("train", "val", "test")
RANDOM = 100


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of study_sort."""

    model: str = "gpt-nano-sort"
    """The sorter's folder."""
    out: Path = Path("sort")
    """Folder of the inputs and tasks."""
    circuits: Path | None = None
    """Folder of circuits to check, of the sorter or, with --bridge, of its student; none: write the inputs."""
    bridge: str = ""
    """Student with bridges."""
    seed: int = 0
    """Seed of random node sets."""


def inputs() -> list[str]:
    """Every input, each followed by its answer."""
    return ["".join(letters) + "".join(sorted(letters)) for letters in product(LETTERS, repeat=LENGTH)]


def pairs(place: int, answers: str) -> list[dict[str, str]]:
    """Every pair of inputs that differ in one letter by which the answer's letter at `place` is the one or the other.

    The prompts end with the answer up to there.
    """
    right, wrong = answers
    found = []
    for row, at in product(inputs(), range(LENGTH)):
        text = row[:LENGTH]
        other = text[:at] + wrong + text[at + 1 :]
        told, changed = "".join(sorted(text)), "".join(sorted(other))
        if text[at] == right and (told[place], changed[place]) == (right, wrong):
            prompts = {"clean": text + told[:place], "corrupt": other + changed[:place]}
            found.append(prompts | {"answer": right, "other": wrong})
    return found


def write(options: Options) -> None:
    """The inputs, the tasks, and the inputs beside the model."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sort.txt").write_text("\n".join(inputs()) + "\n")
    for name, (place, answers) in TASKS.items():
        lines = [json.dumps(pair) for pair in pairs(place, answers)]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} pairs")
    ids = load_tokenizer(options.model)(inputs(), add_special_tokens=False, verbose=False)["input_ids"]
    save_sample(Path(options.model), torch.tensor(ids), vocab_size=len(LETTERS))
    print(f"{len(ids)} inputs in {options.out} and beside {options.model}")


@torch.no_grad()
def judged(subject: Subject, rows: Tensor, task: str, tap: Tap | None) -> tuple[float, float, float]:
    """On all inputs whose letter is one of the two: task loss in nats, and accuracy, mean over the two letters; and on
    all inputs whatever, the share whose likeliest letter is the right one."""
    place, answers = TASKS[task]
    one, two = (LETTERS.index(letter) for letter in answers)
    logits = subject.model.run(rows[:, : LENGTH + place], tap=tap)[:, -1]
    letter = rows[:, LENGTH + place]
    difference = (logits[:, one] - logits[:, two]) * torch.where(letter == one, 1.0, -1.0)
    right = [float((difference[letter == each] > 0).float().mean()) for each in (one, two)]
    among = difference[(letter == one) | (letter == two)]
    return float(two_way_loss(among)), sum(right) / 2, float((logits.argmax(-1) == letter).float().mean())


def drawn(nodes: Nodes, seed: int) -> list[Nodes]:
    """Random node sets, as many nodes at each location."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(RANDOM):
        orders = {name: torch.randperm(len(kept), generator=generator) for name, kept in nodes.items()}
        sets.append({name: orders[name] < int(kept.sum()) for name, kept in nodes.items()})
    return sets


def check(options: Options, subject: Subject, rows: Tensor, file: Path) -> None:
    """Prints a circuit's rows of the table."""
    circuit, model = Circuit.load(file), subject.model
    task, name = load_task(options.out / f"{circuit.task}.jsonl"), circuit.task
    counts = circuit.counts(model)
    print(f"\n{name}: {counts['nodes']} nodes, {counts['edges_pruned']:,} of {counts['edges_induced']:,} edges")
    losses = []
    for split in SPLITS:
        batch = encode(task, subject.tokenizer, split, task.size(split), options.seed)
        with torch.no_grad():
            each = softplus(-answer_difference(model, batch, circuit.tap(model))).reshape(2, -1).mean(0)
        losses.append(each)
    test, every = losses[-1], torch.cat(losses)
    error = float(test.std()) / len(test) ** 0.5
    print(f"  circuit's loss: test split {test.mean():.4f} +- {error:.4f} ({len(test)} pairs), "
          f"all pairs {every.mean():.4f} ({len(every)})")  # fmt: skip
    print("  on all inputs                    loss  accuracy  right of all 729")
    nothing = MaskTap(all_nodes(model.widths, keep=False), circuit.means)
    single = {
        "model": None,
        "circuit": circuit.tap(model),
        "without the circuit": without(circuit.nodes, circuit.means),
    }
    for label, tap in (single | {"nothing but embeddings": nothing}).items():
        print(f"  {label:28} {_row(judged(subject, rows, name, tap))}")
    sets = drawn(circuit.nodes, options.seed)
    for label, make in (("random circuits", MaskTap), ("without random nodes", without)):
        found = torch.tensor([judged(subject, rows, name, make(nodes, circuit.means)) for nodes in sets])
        print(f"  {label + ', median':28} {_row(found.median(0).values.tolist())}")
        best = (found[:, 0].min(), found[:, 1].max(), found[:, 2].max())
        print(f"  {label + ', best of 100':28} {_row([float(value) for value in best])}")


def _row(values: Sequence[float]) -> str:
    return f"{values[0]:8.4f}  {values[1]:8.3f}  {values[2]:16.3f}"


def crossed(options: Options, rows: Tensor) -> None:
    """Prints what a student and its bridges are worth on all inputs, and the interchange of its circuits."""
    dense, student, bridges = load_pair(options.bridge)
    metrics = bridge_metrics(dense.model, student.model, bridges, rows, batch=len(rows))
    sampled = read_json(Path(options.bridge) / "bridges.json", what="metrics")
    print("\nbridges              all inputs / held-out ones")
    for key in ("dense_ce", "student_ce", "student_kl"):
        print(f"  {key:16} {metrics[key]:.4f} / {sampled[key]:.4f}")
    for site, found in metrics["sites"].items():
        keys = ("nmse_d2s", "nmse_s2d", "kl_d2s", "kl_s2d")
        print(
            f"  {site:12} " + "  ".join(f"{key} {found[key]:.3f} / {sampled['sites'][site][key]:.3f}" for key in keys)
        )
    with torch.no_grad():
        told = student.model.run(rows[:, :-1])[:, LENGTH - 1 :].argmax(-1) == rows[:, LENGTH:]
    print(f"  student: {told.float().mean():.4f} of letters, {int(told.all(1).sum())} of {len(rows)} inputs sorted")
    active = active_channels(student.model, rows[:, :-1], batch=len(rows))
    for file in sorted((options.circuits or Path()).glob("*.circuit.safetensors")):
        circuit = Circuit.load(file)
        task = load_task(options.out / f"{circuit.task}.jsonl")
        live = live_channels(circuit.nodes, n_layer=student.model.n_layer, d_model=student.model.d_model)
        controls = list(random_channels(live, active, 20, seed=options.seed))
        batches = [encode(task, dense.tokenizer, split, task.size(split), 0) for split in SPLITS]
        for label, batch in (("all pairs", reduce(joined, batches)), ("test pairs", batches[-1])):
            found = interchange(dense.model, student.model, bridges, batch, live, controls=controls)
            for site in found.sites:
                chance = sum(site.controls) / len(site.controls)
                print(
                    f"  {circuit.task}, {label}, {site.site}: {site.channels} channels, effect {site.effect:.3f}, "
                    f"all channels {site.ceiling:.3f}, random {chance:.3f} (p {site.p:.2f})"
                )


def study(options: Options) -> None:
    """Write, or check."""
    if options.circuits is None:
        write(options)
        return
    torch.set_num_threads(1)
    sorter = load_subject(options.model)
    if options.bridge:
        crossed(options, sorter.sample)
        sorter = load_subject(options.bridge)
    rows = load_subject(options.model).sample
    for file in sorted(options.circuits.glob("*.circuit.safetensors")):
        check(options, sorter, rows, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study on a command line; returns the exit status."""
    return command.run(study, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
