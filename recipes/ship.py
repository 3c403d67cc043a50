"""Make a trained model ready for others: a small folder with all that circuits need beside it.

    python recipes/ship.py --model runs/sparse --out distill/pretrained/sparse --bigram int8
    python recipes/ship.py --model runs/student --dense dense_gpt2 --out distill/pretrained/student --bigram int8

The folder holds the model without its zeros, tokenizer, held-out windows, ablation values of every node, a manifest
with how it was trained and its loss on these windows, measured on what was stored, and a card, README.md; of a student
with bridges the bridges too. --bigram int8 rounds the bigram table to a byte an entry: half the file of a small model,
for less than 0.0005 nats. Expect seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridges.folder import DENSE as DENSE_FILE
from bridges.folder import MODEL
from bridges.lineup import ship_bridged
from distill import command
from distill.artifact import check_free, read_manifest
from distill.model.compact import TablePrecision
from distill.model.load import SHIPPED
from distill.shipping import ship


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of ship."""

    model: Path
    """Run folder of train_sparse, train_dense or fit_bridges, a model folder, or a shipped one, by its folder or short
    name, to be stored anew."""
    out: Path
    """Folder to make."""
    dense: str | None = None
    """Of a student with bridges: where its dense model is to be found from now on, a folder or the short name of a
    shipped one; none: where it was."""
    bigram: TablePrecision = "float16"
    """How the bigram table is stored: float32 keeps it, float16 and int8 round it."""
    overwrite: bool = False
    """Replace a folder of the same kind."""


def run(options: Options) -> None:
    """Check where it goes, copy, print."""
    there = options.model.is_dir() or not (SHIPPED / options.model).is_dir()
    model = options.model if there else SHIPPED / options.model
    bridged = (model / DENSE_FILE).is_file()
    if options.dense is not None and not bridged:
        raise ValueError(f"dense: {options.model} is no student with bridges; allowed is --dense with one alone")
    check_free(options.out, "bridge" if bridged else "model", replace=options.overwrite)
    if bridged:
        ship_bridged(model, options.out, dense=options.dense, bigram=options.bigram)
    else:
        ship(model, options.out, bigram=options.bigram)
    made = read_manifest(options.out / MODEL if bridged else options.out, "model")
    extra = made["provenance"]["extra"]
    size = sum(one.stat().st_size for one in options.out.rglob("*") if one.is_file())
    print(f"held-out loss {extra['heldout_loss']:.4f} nats per token, model {extra['fingerprint'][:12]}, "
          f"{size / 2**20:.2f} MiB in {options.out}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(run, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
