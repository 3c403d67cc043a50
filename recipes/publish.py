"""Upload a model to the Hugging Face hub, with a card made from its own record.

    python recipes/publish.py --model runs/mine --repo me/mine --dry-run
    python recipes/publish.py --model runs/mine --repo me/mine --license mit

--dry-run prints the card and the files and touches no network. Without it the token of `hf auth login` is used and a
new repository is private, unless --public. Weights are safetensors only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distill import command
from distill.model.card import push_to_hub


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of publish."""

    model: str
    """Model folder, run folder, or short name of a shipped model."""
    repo: str
    """Name on the hub: user/model."""
    license: str | None = None
    """Identifier of the model's licence, such as mit; none: the card says none."""
    public: bool = False
    """Make a new repository public."""
    dry_run: bool = False
    """Print what would be uploaded and stop."""


def publish(options: Options) -> None:
    """Make the card, upload, print."""
    upload = push_to_hub(
        options.model,
        options.repo,
        license=options.license,
        private=not options.public,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        print(upload.card)
    print(upload.lines())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe on a command line; returns the exit status."""
    return command.run(publish, Options, argv, description=__doc__ or "")


if __name__ == "__main__":
    raise SystemExit(main())
