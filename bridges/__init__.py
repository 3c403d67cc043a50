"""Two models at a time: students, bridges, and circuits compared across them."""

from bridges.baselines import bigram_loss, least_squares_bridges, mean_bridges
from bridges.fit import PRESETS, Fit, StudentConfig, fit_bridges
from bridges.folder import BridgedInfo, BridgeMismatchError, DenseRecord, load_bridged, save_bridged
from bridges.hybrid import dense_to_sparse, hybrid, random_passes, sparse_to_dense
from bridges.losses import kl, nmse, nmse_floor
from bridges.maps import Bridges, BridgeShape
from bridges.metrics import bridge_metrics, plot_metrics
from bridges.objective import BridgeConfig, BridgeObjective, check_pair
from bridges.subspace import (
    ResidualMeans,
    SubspaceTest,
    bridged_subspace,
    live_channels,
    residual_means,
    subspace_test,
)

__all__ = [
    "PRESETS",
    "BridgeConfig",
    "BridgeMismatchError",
    "BridgeObjective",
    "BridgeShape",
    "BridgedInfo",
    "Bridges",
    "DenseRecord",
    "Fit",
    "ResidualMeans",
    "StudentConfig",
    "SubspaceTest",
    "bigram_loss",
    "bridge_metrics",
    "bridged_subspace",
    "check_pair",
    "dense_to_sparse",
    "fit_bridges",
    "hybrid",
    "kl",
    "least_squares_bridges",
    "live_channels",
    "load_bridged",
    "mean_bridges",
    "nmse",
    "nmse_floor",
    "plot_metrics",
    "random_passes",
    "residual_means",
    "save_bridged",
    "sparse_to_dense",
    "subspace_test",
]
