"""From the name of a corpus to packed tokens, in one call."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from distill.artifact import read_manifest
from distill.data.corpus import read_corpus
from distill.data.tokens import TokenData, pack, tokenizer_fingerprint, train_tokenizer


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int = 2048,
    tokenizer: PreTrainedTokenizerFast | None = None,
    heldout_fraction: float = 0.05,
    seed: int = 0,
    command: str = "distill.data.prepare",
) -> TokenData:
    """Packs a corpus into `out`, or loads what an earlier call with the same settings left there.

    Args:
        sources: see `read_corpus`; or one folder that holds packed tokens already, which is loaded as it is.
        out: the folder of packed tokens.
        vocab_size: size of the tokenizer that is trained on the corpus, where none is given.
        tokenizer: encodes the corpus instead of a new one; its size counts, not `vocab_size`.
        heldout_fraction: share of the files held out.
        seed: decides which files.
        command: recorded as what made the folder.

    ValueError for sources that cannot be read, and where `out` holds tokens of other settings or another tokenizer.
    """
    if len(sources) == 1 and (Path(sources[0]) / "train.bin").is_file():
        return _checked(TokenData.load(sources[0]), tokenizer)
    if (out / "manifest.json").is_file():
        made = read_manifest(out, "tokens", verify=False)["provenance"]
        # The sources of the record are spelt by the corpus; what was asked for is compared in its order.
        before, now = (list(made["config"]["sources"]), made["seed"]), (list(sources), seed)
        if before != now:
            raise ValueError(f"out: {out} holds tokens of sources and seed {before}, asked for are {now}")
        data = _checked(TokenData.load(out), tokenizer)
        if tokenizer is None and data.vocab_size != vocab_size:
            raise ValueError(f"out: {out} holds tokens of a vocabulary of {data.vocab_size}, asked for is {vocab_size}")
        return data
    corpus = read_corpus(sources, heldout_fraction=heldout_fraction, seed=seed)
    if tokenizer is None:
        tokenizer = train_tokenizer([document.text for document in corpus.train], vocab_size)
    return pack(corpus, tokenizer, out, command=command)


def _checked(data: TokenData, tokenizer: PreTrainedTokenizerFast | None) -> TokenData:
    if tokenizer is not None and tokenizer_fingerprint(data.tokenizer()) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"tokenizer: the tokens in {data.folder} were made by another tokenizer than the one given")
    return data
