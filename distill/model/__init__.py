"""Models: one run for sparse and dense, and what can be read and written along it."""

from transformers import AutoConfig, AutoModelForCausalLM

from distill.model.dense import DenseModel
from distill.model.load import check_tokenizer, load_model, load_tokenizer, shipped_names
from distill.model.operations import set_path
from distill.model.run import Runnable
from distill.model.sites import (
    Chain,
    Edit,
    Record,
    Replace,
    Tap,
    chain,
    kind_of,
    layer_of,
    node_locations,
    node_name,
    residual_sites,
    split_node,
)
from distill.model.topk import abs_topk
from distill.model.transformer import Architecture, SparseTransformer, SparseTransformerConfig

AutoConfig.register(SparseTransformerConfig.model_type, SparseTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(SparseTransformerConfig, SparseTransformer, exist_ok=True)

__all__ = [
    "Architecture",
    "Chain",
    "DenseModel",
    "Edit",
    "Record",
    "Replace",
    "Runnable",
    "SparseTransformer",
    "SparseTransformerConfig",
    "Tap",
    "abs_topk",
    "chain",
    "check_tokenizer",
    "kind_of",
    "layer_of",
    "load_model",
    "load_tokenizer",
    "node_locations",
    "node_name",
    "residual_sites",
    "set_path",
    "shipped_names",
    "split_node",
]
