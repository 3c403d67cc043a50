"""Training of weight-sparse transformers: projection, optimiser, loop, checkpoints, held-out loss [G A.2]."""

from distill.training.evaluate import heldout_loss, per_token_losses
from distill.training.optim import make_optimizer, rate_factor, sharkfin_factor
from distill.training.pretrain import Pretrained, next_token_loss, plan, pretrain, save_model
from distill.training.sparsity import kept_fraction, project_, sparse_parameters, sparsity_report
from distill.training.trainer import Objective, TrainConfig, TrainingError, train, tune_malloc

__all__ = [
    "Objective",
    "Pretrained",
    "TrainConfig",
    "TrainingError",
    "heldout_loss",
    "kept_fraction",
    "make_optimizer",
    "next_token_loss",
    "per_token_losses",
    "plan",
    "pretrain",
    "project_",
    "rate_factor",
    "save_model",
    "sharkfin_factor",
    "sparse_parameters",
    "sparsity_report",
    "train",
    "tune_malloc",
]
