"""The task suite: what there is, and what a model makes of it.

    python recipes/tasks.py                                        # lists the tasks
    python recipes/tasks.py --task my_pairs.jsonl                  # checks a file of one's own
    python recipes/tasks.py --model sparse --out runs/tasks.json   # accuracy and loss of a model, task by task
    python recipes/tasks.py --model sparse dense --split test      # several models, and a table of them side by side
    python recipes/tasks.py --task for_while --show 5              # pairs with the boundaries of their tokens

The table has a line per task and split: whether the task fits the model's tokenizer, pairs, longest prompt in tokens,
accuracy and task loss with 95% intervals, and the loss with all nodes ablated, marked where that alone does the task.
A control is asked for behind the name: --task for_while:nonsense. A shipped model takes a minute or two for all tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill import command
from distill.artifact import write_record
from distill.circuits import load_subject, load_task
from distill.circuits.task_document import document, listing, pairs_shown
from distill.circuits.task_table import evaluate_all, summary, table
from distill.circuits.tasks import SPLITS, task_names
from distill.model import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of tasks."""

    task: tuple[str, ...] = tuple(task_names("all"))
    """Tasks by name, or JSONL files; all built-in ones by default."""
    model: tuple[str, ...] = ()
    """Models to measure: folder, short name of a shipped model, or hub name."""
    split: tuple[Literal["train", "val", "test", "shift"], ...] = SPLITS
    """Splits to print; all are measured."""
    show: int = 0
    """Number of pairs of each task to print, with the token boundaries of the (first) model, or of the shipped ones."""
    pairs: int = 200
    """Pairs to measure per split."""
    corpus: tuple[str, ...] = ()
    """Text to measure ablation values on, for models that bring none (see train_sparse)."""
    document: bool = False
    """Print the document that lies beside the data."""
    out: Path | None = None
    """JSON file for the tables."""
    seed: int = 0
    """Seed of the pairs drawn."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1."""


def tasks(options: Options) -> None:
    """Read the tasks; list them, show them, or measure a model on them."""
    if not options.task:
        raise ValueError("task: got none; allowed are one or more")
    if options.pairs < 1 or options.show < 0:
        raise ValueError(f"pairs, show: got {options.pairs}, {options.show}; allowed are 1 and more, 0 and more")
    if options.out is not None and not options.model:
        raise ValueError("out: holds the table of a model; give --model as well")
    chosen = [load_task(name) for name in options.task]
    if options.document:
        print(document(chosen))
    elif options.show:
        tokenizer = load_tokenizer((*options.model, "sparse")[0])
        print("\n\n".join(pairs_shown(task, tokenizer, options.show, options.seed) for task in chosen))
    elif options.model:
        records = []
        for name in options.model:
            subject = load_subject(name, corpus=options.corpus, device=options.device)
            records.append(evaluate_all(subject, chosen, pairs=options.pairs, seed=options.seed))
            print(table(records[-1], options.split), end="\n\n", flush=True)
        print(summary(records))
        if options.out is not None:
            write_record(options.out, {"models": records})
            print(f"tables in {options.out}")
    else:
        print(listing(chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(tasks, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
