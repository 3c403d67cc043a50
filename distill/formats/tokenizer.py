"""OpenAI's tokenizer files, `encoder.json` and `vocab.bpe`, to a Hugging Face tokenizer and back.

Byte-level BPE as in GPT-2's files: the encoder numbers the 256 bytes (each as a printable character), then what each
merge makes, in the order of `vocab.bpe`. Only the pattern that splits text first is not in the files; it is that of
tinypython_2k, with which this package trains its own tokenizers as well.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.artifact import ArtifactError, read_json, write_json
from distill.data.tokens import END_OF_TEXT, SPLIT_PATTERN

ENCODER_FILE, MERGES_FILE = "encoder.json", "vocab.bpe"
MAX_BYTES = 64 * 2**20
UNUSED = "<|startoftext|>"
"""A token that GPT-2-style encoders may list and nothing makes."""
_HEAD = "#version"


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder with both files; `<|endoftext|>` ends texts and pads them on the left.

    Raises ArtifactError, a ValueError, that names the file and what is wrong in it: not there, not of its form, a merge
    of what is no token, an id that is missing or out of the order of the merges.
    """
    encoder, merges = _read_encoder(Path(folder) / ENCODER_FILE), _read_merges(Path(folder) / MERGES_FILE)
    _check(Path(folder), encoder, merges)
    backend = Tokenizer(models.BPE(vocab=encoder, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **ends, padding_side="left", clean_up_tokenization_spaces=False
    )


def _read_encoder(path: Path) -> dict[str, int]:
    found = read_json(path, what="encoder", max_bytes=MAX_BYTES)
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise ArtifactError(f"{path}: allowed is an object of tokens with whole numbers")
    if sorted(found.values()) != list(range(len(found))):
        raise ArtifactError(f"{path}: ids of {len(found)} tokens, allowed are 0 to {len(found) - 1}, each once")
    return found


def _read_merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such merges file")
    if path.stat().st_size > MAX_BYTES:
        raise ArtifactError(f"{path}: merges of {path.stat().st_size} bytes, allowed are {MAX_BYTES}")
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is no text in UTF-8: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith(_HEAD)):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise ArtifactError(f"{path}, line {number}: {line!r}; allowed are two tokens with a space between them")
        merges.append((parts[0], parts[1]))
    return merges


def _check(folder: Path, encoder: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """The bytes are all there, and what the merges make is numbered in their order, by which others merge."""
    singles = pre_tokenizers.ByteLevel.alphabet()
    for token in singles:
        if token not in encoder:
            raise ArtifactError(f"{folder / ENCODER_FILE}: lacks {token!r}; allowed are encoders with all 256 bytes")
    known, before = set(singles), -1
    for left, right in merges:
        made = left + right
        if left not in known or right not in known or made not in encoder:
            raise ArtifactError(
                f"{folder / MERGES_FILE}: merges {left!r} and {right!r}; allowed are tokens that come before, and what "
                f"they make has to be in {ENCODER_FILE}"
            )
        if encoder[made] <= before:
            raise ArtifactError(f"{folder / ENCODER_FILE}: {made!r} has id {encoder[made]}; allowed: in merge order")
        known.add(made)
        before = encoder[made]
    for token in encoder.keys() - known - {END_OF_TEXT, UNUSED}:
        raise ArtifactError(f"{folder / ENCODER_FILE}: holds {token!r}, which no merge in {MERGES_FILE} makes")


def write_tokenizer(folder: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes both files into a folder that is there.

    ValueError for a tokenizer that the files cannot say: no byte-level BPE, another split pattern, or ids that do not
    go by bytes, merges and last `<|endoftext|>`.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    before = backend.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if model.get("type") != "BPE" or not steps or steps[0].get("pattern") != {"Regex": SPLIT_PATTERN}:
        raise ValueError(
            f"tokenizer: a {model.get('type')} that splits text its own way; allowed in {MERGES_FILE} is byte-level "
            "BPE with the split pattern of tinypython_2k"
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    order = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges), END_OF_TEXT]
    vocabulary = tokenizer.get_vocab()
    if [vocabulary.get(token) for token in order] != list(range(len(vocabulary))):
        raise ValueError(
            f"tokenizer: its ids go another way than {ENCODER_FILE} allows: the 256 bytes, merges, {END_OF_TEXT}"
        )
    write_json(Path(folder) / ENCODER_FILE, {token: number for number, token in enumerate(order)})
    lines = [f"{_HEAD}: 0.2", *(" ".join(merge) for merge in merges)]
    (Path(folder) / MERGES_FILE).write_bytes(("\n".join(lines) + "\n").encode())
