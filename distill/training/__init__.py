"""Training of weight-sparse transformers: projection, optimiser, loop, checkpoints, held-out loss [G A.2]."""

from distill.training.checkpoint import best_checkpoint
from distill.training.estimate import Estimate, estimate_run, plan
from distill.training.evaluate import continuation, heldout_loss, per_token_losses
from distill.training.log import make_engine
from distill.training.objective import Objective, next_token_loss
from distill.training.optim import make_optimizer, rate_factor, sharkfin_factor
from distill.training.pretrain import Pretrained, pretrain, save_model
from distill.training.process import tune_malloc
from distill.training.settings import TrainConfig
from distill.training.sparsity import kept_fraction, project_, sparse_parameters, sparsity_report
from distill.training.trainer import TrainingError, train

__all__ = [
    "Estimate",
    "Objective",
    "Pretrained",
    "TrainConfig",
    "TrainingError",
    "best_checkpoint",
    "continuation",
    "estimate_run",
    "heldout_loss",
    "kept_fraction",
    "make_engine",
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
