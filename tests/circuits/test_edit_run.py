"""From a circuit to an edited model: the text that nodes are chosen on, and the text of the account."""

from collections.abc import Callable

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.circuits.ablation import Means
from distill.circuits.edit_run import EditConfig, _texts
from distill.circuits.subject import Subject
from distill.circuits.tasks import TaskBatch
from distill.model import SparseTransformer


def test_windows_follow_the_seed_and_none_is_chosen_on_and_judged_by(
    planted: SparseTransformer,
    planted_means: Means,
    make_windows: Callable[..., Tensor],
    make_prompts: Callable[..., TaskBatch],
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    sample = make_windows()
    subject = Subject(name="", model=planted, tokenizer=word_tokenizer, sample=sample, means=planted_means)
    count, found = len(sample.unique(dim=0)), []
    assert count == len(sample), "windows that can be told apart"
    for seed in (0, 0, 1):
        texts = _texts(subject, EditConfig(seed=seed, windows=4), make_prompts(4, 1), None)
        chosen, judged = ({tuple(row) for row in text.tokens.tolist()} for text in texts)
        assert len(judged) == 4 and len(chosen) == min(32, (count + 2) // 3) and not chosen & judged
        found.append((chosen, judged))
    assert found[0] == found[1] and found[0][0] != found[2][0] and found[0][1] != found[2][1]
    few = Subject(**{**vars(subject), "sample": sample[:1]})
    with pytest.raises(ValueError, match="windows: only 1 of held-out text"):
        _texts(few, EditConfig(), make_prompts(4, 1), None)
