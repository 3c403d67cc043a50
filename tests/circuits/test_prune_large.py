"""Pruning a model of D = 1024 and four layers: what is planted in it comes out, within three minutes."""

import time

import pytest
import torch

from distill.circuits.ablation import node_means
from distill.circuits.prune import PruneConfig, prune_batches
from distill.model.transformer import Architecture, SparseTransformer

D, LAYERS, KEPT, SECONDS = 1024, 4, 0.01, 180.0
FREE = 4  # the channels from here on are the distractors'


@torch.no_grad()
def build(seed: int) -> SparseTransformer:
    """The planted circuit of the other tests in layer 0, and 1% of all other weights at random."""
    model = SparseTransformer.build(
        Architecture(vocab_size=512, context=64, n_layer=LAYERS, d_model=D, d_head=16, bigram=False), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for weight in (matrix for layer in model.layers for matrix in layer.parameters() if matrix.dim() > 1):
        weight.mul_(torch.rand(weight.shape, generator=generator) < KEPT)
        weight *= 0.5 / (KEPT * weight.shape[1]) ** 0.5 / weight[weight != 0].std()
    for layer in model.layers:
        # Nothing but the planted circuit writes where it works, or in its head.
        layer.attn_out.weight[:FREE], layer.mlp_out.weight[:FREE] = 0, 0
    embed = model.embed_tokens.weight
    embed.copy_(0.4 * torch.randn(embed.shape, generator=generator))
    embed[:, :FREE] = 0
    embed[:4, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    embed[4, 1] = 1.0
    embed[:2, 2] = 1.0
    layer = model.layers[0]
    for linear, channel, weight in ((layer.attn_q, 1, 2.4), (layer.attn_k, 2, 3.6), (layer.attn_v, 0, 1.0)):
        linear.weight[:16] = 0
        linear.weight[0, channel] = weight
    layer.attn_out.weight[:, :16] = 0
    layer.attn_out.weight[3, 0] = 1.0
    model.unembed.weight.zero_()
    model.unembed.weight[5, 3], model.unembed.weight[6, 3] = 0.5, -0.5
    return model.eval()


@pytest.mark.slow
def test_a_circuit_of_a_larger_model_takes_under_three_minutes(make_prompts, planted_names):
    model = build(0)
    train, val, verify = (make_prompts(pairs, seed, 32) for seed, pairs in enumerate((256, 64, 64)))
    windows = torch.randint(0, 5, (32, 32), generator=torch.Generator().manual_seed(9))
    means = node_means(model, windows)
    begun = time.process_time()
    circuit = prune_batches(model, "opener", train, val, means, PruneConfig(), verify=verify)
    spent = time.process_time() - begun
    assert set(circuit.node_names) <= set(planted_names) and circuit.n_nodes > 4
    assert circuit.losses["circuit"] <= circuit.target and circuit.losses["verify"] <= circuit.target
    # On one thread, so that the processor's time is at least the clock's on a quiet machine.
    assert spent < SECONDS
