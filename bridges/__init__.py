"""Two models at a time: students, bridges, and circuits compared across them."""

from bridges.agreement import agreements
from bridges.baselines import bigram_loss, least_squares_bridges, load_rivals, mean_bridges, measure
from bridges.basis import add_basis, add_rotated
from bridges.budget import add_budget
from bridges.compare import CompareConfig, Comparison, compare, known_circuits
from bridges.contrast import carry_contrast
from bridges.crossing import add_crossings
from bridges.editing import carry
from bridges.fit import PRESETS, Fit, StudentConfig, fit_bridges, line_of
from bridges.folder import BridgedInfo, BridgeMismatchError, DenseRecord, load_bridged, save_bridged
from bridges.hybrid import dense_to_sparse, hybrid, random_passes, sparse_to_dense
from bridges.lineup import Lineup, load_lineup
from bridges.losses import kl, nmse, nmse_floor
from bridges.maps import Bridges, BridgeShape
from bridges.metrics import bridge_metrics, plot_metrics
from bridges.objective import BridgeConfig, BridgeObjective, check_pair
from bridges.report import table, write_report
from bridges.scratch import train_lineup
from bridges.subspace import (
    ResidualMeans,
    SubspaceTest,
    bridged_subspace,
    live_channels,
    residual_means,
    subspace_test,
)
from bridges.transport import add_subspaces
from bridges.watch import shadow_watch

__all__ = [
    "PRESETS",
    "BridgeConfig",
    "BridgeMismatchError",
    "BridgeObjective",
    "BridgeShape",
    "BridgedInfo",
    "Bridges",
    "CompareConfig",
    "Comparison",
    "DenseRecord",
    "Fit",
    "Lineup",
    "ResidualMeans",
    "StudentConfig",
    "SubspaceTest",
    "add_basis",
    "add_budget",
    "add_crossings",
    "add_rotated",
    "add_subspaces",
    "agreements",
    "bigram_loss",
    "bridge_metrics",
    "bridged_subspace",
    "carry",
    "carry_contrast",
    "check_pair",
    "compare",
    "dense_to_sparse",
    "fit_bridges",
    "hybrid",
    "kl",
    "known_circuits",
    "least_squares_bridges",
    "line_of",
    "live_channels",
    "load_bridged",
    "load_lineup",
    "load_rivals",
    "mean_bridges",
    "measure",
    "nmse",
    "nmse_floor",
    "plot_metrics",
    "random_passes",
    "residual_means",
    "save_bridged",
    "shadow_watch",
    "sparse_to_dense",
    "subspace_test",
    "table",
    "train_lineup",
    "write_report",
]
