"""From the name of a corpus to packed tokens, in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    replace: bool = False,
) -> TokenData:
    """Packs a corpus into `out`, or loads what an earlier call with the same settings left there.

    Args:
        sources: see `read_corpus`; or one folder that holds packed tokens already, which is loaded as it is, its
            held-out part and seed included.
        out: the folder of packed tokens.
        vocab_size: size of the tokenizer that is trained on the corpus, where none is given; packed tokens must have
            this vocabulary.
        tokenizer: encodes the corpus instead of a new one; its size counts, not `vocab_size`.
        heldout_fraction: share of the files held out.
        seed: decides which files.
        command: recorded as what made the folder.
        replace: pack anew where `out` holds tokens of other settings.

    ValueError for sources that cannot be read, packed tokens of another vocabulary or tokenizer than asked for, and,
    unless they may be replaced, tokens of other settings in `out`.
    """
    if len(sources) == 1 and (Path(sources[0]) / "train.bin").is_file():
        data = TokenData.load(sources[0])
        reason = _differs(data, vocab_size, tokenizer)
        if reason:
            raise ValueError(reason)
        return data
    if (out / "manifest.json").is_file():
        made = read_manifest(out, "tokens", verify=False)["provenance"]
        reason = _other_settings(made, sources, seed, heldout_fraction)
        if not reason:
            data = TokenData.load(out)
            reason = _differs(data, vocab_size, tokenizer)
            if not reason:
                return data
        if not replace:
            raise ValueError(
                f"out: {out} holds other tokens; allowed are another folder, or to replace them ({reason})"
            )
    corpus = read_corpus(sources, heldout_fraction=heldout_fraction, seed=seed)
    if tokenizer is None:
        tokenizer = train_tokenizer([document.text for document in corpus.train], vocab_size)
    return pack(corpus, tokenizer, out, command=command, replace=replace)


def _other_settings(made: Mapping[str, Any], sources: Sequence[str], seed: int, heldout_fraction: float) -> str | None:
    """In what packed tokens differ from what is asked for, None where they do not."""
    # The sources of the record are spelt by the corpus; what was asked for is compared in its order.
    before, now = list(made["config"]["sources"]), list(sources)
    if before != now:
        return f"sources: they are of {before}, asked for are {now}"
    if made["seed"] != seed:
        return f"seed: they are of {made['seed']}, asked for is {seed}"
    held = made["extra"].get("corpus", {}).get("heldout_fraction", heldout_fraction)
    return None if held == heldout_fraction else f"heldout_fraction: {held} of them, asked for is {heldout_fraction}"


def _differs(data: TokenData, vocab_size: int, tokenizer: PreTrainedTokenizerFast | None) -> str | None:
    """In what the vocabulary of the tokens differs from what is asked for, None where it does not."""
    if tokenizer is not None:
        same = tokenizer_fingerprint(data.tokenizer()) == tokenizer_fingerprint(tokenizer)
        return None if same else f"tokenizer: the tokens in {data.folder} were made by another one than the one given"
    if data.vocab_size != vocab_size:
        return (
            f"vocab_size: the tokens in {data.folder} have a vocabulary of {data.vocab_size}, asked for is {vocab_size}"
        )
    return None
