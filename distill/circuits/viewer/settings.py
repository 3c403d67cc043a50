"""How much of a circuit goes into its page."""

from dataclasses import dataclass

from distill.command import no_type_check

MEGABYTE = 2**20


@no_type_check
@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What a page shows of each circuit; every value is checked when it is made."""

    pairs: int = 4
    """Task pairs that are shown, with every node's activation on them."""
    judged: int = 16
    """Task pairs that effects and correlations are measured on."""
    longest: int = 40
    """Tokens shown of a prompt, the last ones."""
    windows: int = 96
    """Windows of held-out text that examples are looked for in."""
    top: int = 5
    """Examples with the largest activation, each from a window of its own."""
    bottom: int = 3
    """Examples with the smallest activation, each from a window of its own."""
    quantiles: tuple[float, ...] = (0.99, 0.9, 0.75, 0.5, 0.25)
    """Shares of the tokens where a node is not zero that lie below one further example each."""
    coloured: int = 12
    """Windows of it that are coloured by how strongly the circuit is at work."""
    before: int = 12
    """Tokens shown before an example's own."""
    after: int = 3
    """Tokens shown after it."""
    exact: int = 400
    """Nodes up to which ablation effects are measured by leaving each out; first-order effects beyond."""
    edges: int = 60_000
    """Edges that go into a page, the largest weights first."""
    megabytes: float = 7.5
    """Size of a page, above which the examples of the nodes with the least effect are left out."""
    seed: int = 0
    """Seed of the prompts that are drawn."""

    def __post_init__(self) -> None:
        for name in ("pairs", "judged", "longest", "windows", "coloured", "top", "edges"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are 1 and more")
        for name in ("bottom", "before", "after", "exact", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed are 0 and more")
        if not all(0 < share < 1 for share in self.quantiles):
            raise ValueError(f"quantiles: got {self.quantiles}; allowed are numbers between 0 and 1")
        if not self.megabytes > 1:
            raise ValueError(
                f"megabytes: got {self.megabytes}; allowed are numbers above 1, as the page itself has 0.5"
            )
