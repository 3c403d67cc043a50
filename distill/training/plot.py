"""A picture of a run: loss, sparsity, rates and norms over the tokens seen, from the lines of its metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURE = "training.png"
PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("loss, nats per token", ("loss", "heldout_loss"), False),
    ("share of entries kept, of dead units", ("kept", "dead_neurons", "dead_head_channels"), True),
    ("rate", ("rate", "rate_sparse"), False),
    ("norm", ("gradient_norm", "weight_norm"), True),
)
"""Label, lines of it, and whether the axis is logarithmic."""


def plot_run(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the lines of a run into a file.

    Arguments:
        history: as `train` returns; a value that a line does not have leaves no point.
        path: of a type that matplotlib writes, such as `.png`.
    """
    # Not pyplot: it would choose a window system, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, names, logarithmic) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(line["tokens"], line[name]) for line in history if line.get(name) is not None]
            points = [point for point in points if point[1] > 0 or not logarithmic]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
        axes.set(xlabel="tokens", title=label, yscale="log" if logarithmic else "linear")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)
