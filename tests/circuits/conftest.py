"""A hand-built model whose smallest circuit is known, among distractors.

Words: A and B open, x and y fill, e ends a prompt, C and D close; A ... e is answered by C, B ... e by D. The word e
asks (channel 1), the openers are found (channel 2), and what they are is copied (channel 0) to channel 3, which C and D
read with opposite signs. The fillers carry channel 0 too, at random: attention that does not find the opener copies
noise.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.circuits.ablation import Means, node_means
from distill.circuits.tasks import TaskBatch
from distill.data.sample import save_sample
from distill.model.transformer import Architecture, SparseTransformer

WORDS = ("A", "B", "x", "y", "e", "C", "D")
PLANTED = (
    "0.attn.act_in.0",
    "0.attn.act_in.1",
    "0.attn.act_in.2",
    "0.attn.q.0",
    "0.attn.k.0",
    "0.attn.v.0",
    "0.attn.resid_delta.3",
)
PLANTED_EDGES = (
    ("0.attn.act_in.1", "0.attn.q.0"),
    ("0.attn.act_in.2", "0.attn.k.0"),
    ("0.attn.act_in.0", "0.attn.v.0"),
    ("0.attn.v.0", "0.attn.resid_delta.3"),
)
D, FREE = 16, 4  # the channels from FREE on are the distractors'


@torch.no_grad()
def build(seed: int, topk_fraction: float | None = 0.5, stray: float = 0.0) -> SparseTransformer:
    """The planted model; `seed` draws the distractors.

    `stray` is the size of six further weights between planted nodes, edges that the task does not need.
    """
    torch.manual_seed(seed)
    model = SparseTransformer.build(
        Architecture(vocab_size=len(WORDS), context=16, n_layer=1, d_model=D, d_head=8, n_head=1, d_mlp=8,
                     topk_fraction=topk_fraction, sink=False, bigram=False)
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    layer, embed = model.layers[0], model.embed_tokens.weight
    embed[:, FREE:] = 0.2 * torch.randn(len(WORDS), D - FREE)
    embed[:4, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    embed[4, 1] = 1.0
    embed[:2, 2] = 1.0
    layer.attn_q.weight[0, 1] = 1.2
    layer.attn_k.weight[0, 2] = 1.8
    layer.attn_v.weight[0, 0] = 1.0
    layer.attn_out.weight[3, 0] = 1.0
    for linear, planted in ((layer.attn_q, 1), (layer.attn_k, 2), (layer.attn_v, 0)):
        if stray:
            others = [channel for channel in range(3) if channel != planted]
            linear.weight[0, others] = stray * torch.tensor([1.0, -1.0])
        linear.weight[1:, FREE:] = 0.2 * torch.randn(7, D - FREE)
    layer.attn_out.weight[FREE:, 1:] = 0.2 * torch.randn(D - FREE, 7)
    layer.mlp_in.weight[:, FREE:] = 0.2 * torch.randn(8, D - FREE)
    layer.mlp_out.weight[FREE:] = 0.2 * torch.randn(D - FREE, 8)
    model.unembed.weight[5, 3], model.unembed.weight[6, 3] = 3.0, -3.0
    return model.eval()


def prompts(pairs: int, seed: int, longest: int = 10) -> TaskBatch:
    """Pairs A/B + fillers + e, of differing lengths, padded with x."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 4, (pairs, longest), generator=generator)
    last = torch.randint(6, longest, (pairs,), generator=generator)
    place = (torch.rand(pairs, generator=generator) * last).long()
    rows = torch.arange(pairs)
    tokens[rows, last] = 4
    clean, corrupt = tokens.clone(), tokens.clone()
    label = torch.arange(pairs) % 2
    clean[rows, place], corrupt[rows, place] = label, 1 - label
    labels = torch.cat([label, 1 - label])
    mask = (torch.arange(longest) <= last[:, None]).long()
    return TaskBatch(
        tokens=torch.cat([clean, corrupt]),
        attention_mask=torch.cat([mask, mask]),
        last=torch.cat([last, last]),
        answer=5 + labels,
        other=6 - labels,
        orientation=1.0 - 2.0 * labels,
        labels=labels,
    )


def windows(seed: int = 0) -> Tensor:
    """Pretraining text: words at random."""
    return torch.randint(0, 5, (64, 12), generator=torch.Generator().manual_seed(seed))


def chosen(model: SparseTransformer, names: tuple[str, ...] = PLANTED) -> dict[str, Tensor]:
    """A node set from names."""
    nodes = {location: torch.zeros(width, dtype=torch.bool) for location, width in model.widths.items()}
    for name in names:
        location, _, channel = name.rpartition(".")
        nodes[location][int(channel)] = True
    return nodes


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    found = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="x"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def task_file(path: Path, pairs: int = 120) -> Path:
    """Prompts as pairs of texts."""
    batch, lines = prompts(pairs, 3), []
    for row in range(pairs):
        clean, corrupt = (
            " ".join(WORDS[int(token)] for token in batch.tokens[one, : int(batch.last[one]) + 1])
            for one in (row, row + pairs)
        )
        answer, other = WORDS[int(batch.answer[row])], WORDS[int(batch.other[row])]
        lines.append(json.dumps({"clean": clean, "corrupt": corrupt, "answer": f" {answer}", "other": f" {other}"}))
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return path


def folder(path: Path, model: SparseTransformer) -> Path:
    """A model's folder with its tokenizer and held-out windows."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    save_sample(path, windows(), vocab_size=len(WORDS))
    return path


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer()


@pytest.fixture
def make_task_file() -> Callable[..., Path]:
    return task_file


@pytest.fixture
def make_folder() -> Callable[..., Path]:
    return folder


@pytest.fixture
def planted_names() -> tuple[str, ...]:
    return PLANTED


@pytest.fixture
def planted_edges() -> tuple[tuple[str, str], ...]:
    return PLANTED_EDGES


@pytest.fixture
def make_planted() -> Callable[..., SparseTransformer]:
    return build


@pytest.fixture
def make_prompts() -> Callable[..., TaskBatch]:
    return prompts


@pytest.fixture
def planted() -> SparseTransformer:
    return build(0)


@pytest.fixture
def planted_means(planted: SparseTransformer) -> Means:
    return node_means(planted, windows())


@pytest.fixture
def make_windows() -> Callable[..., Tensor]:
    return windows


@pytest.fixture
def choose() -> Callable[..., dict[str, Tensor]]:
    return chosen


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
