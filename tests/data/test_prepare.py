from pathlib import Path

import numpy as np
import pytest
import torch

from distill.artifact import ArtifactError
from distill.data import load_sample, prepare, save_sample, spread_windows, train_tokenizer


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        lines = "\n".join(f"value_{i} = call({number}, 'name {i * number}')" for i in range(30))
        (folder / f"{number}.py").write_text(lines)
    return folder


def test_a_second_call_takes_what_the_first_made(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    first = prepare([str(texts)], out, vocab_size=300)
    stamp = (out / "train.bin").stat().st_mtime_ns
    again = prepare([str(texts)], out, vocab_size=300)
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    assert again.fingerprint == first.fingerprint
    assert first.vocab_size == 300
    assert len(first.train) > len(first.heldout) > 0


def test_packed_tokens_stand_for_a_corpus(texts: Path, tmp_path: Path) -> None:
    first = prepare([str(texts)], tmp_path / "tokens", vocab_size=300)
    packed, unused = [str(tmp_path / "tokens")], tmp_path / "unused"
    assert prepare(packed, unused, vocab_size=300).fingerprint == first.fingerprint
    assert prepare(packed, unused, tokenizer=first.tokenizer()).fingerprint == first.fingerprint
    with pytest.raises(ValueError, match="vocab_size: .* have a vocabulary of 300, asked for is 2048"):
        prepare(packed, unused)
    assert not (tmp_path / "unused").exists()


def test_other_settings_are_refused(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    prepare([str(texts)], out, vocab_size=300)
    with pytest.raises(ValueError, match="vocabulary of 300, asked for is 310"):
        prepare([str(texts)], out, vocab_size=310)
    with pytest.raises(ValueError, match="out: .* holds other tokens; .*seed: they are of 0"):
        prepare([str(texts)], out, vocab_size=300, seed=1)
    with pytest.raises(ValueError, match="heldout_fraction: 0.05 of them, asked for is 0.2"):
        prepare([str(texts)], out, vocab_size=300, heldout_fraction=0.2)
    with pytest.raises(ValueError, match="sources: they are of .* asked for are"):
        prepare([str(texts), "idioms:0.01"], out, vocab_size=300)
    other = train_tokenizer([path.read_text() for path in texts.iterdir()], 290)
    with pytest.raises(ValueError, match="tokenizer: the tokens in .* were made by another one"):
        prepare([str(texts)], out, tokenizer=other)


def test_other_settings_are_packed_anew_where_they_may_be(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    first = prepare([str(texts)], out, vocab_size=300).fingerprint
    stamp = (out / "train.bin").stat().st_mtime_ns
    assert prepare([str(texts)], out, vocab_size=300, replace=True).fingerprint == first
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    assert prepare([str(texts)], out, vocab_size=290, replace=True).vocab_size == 290
    assert prepare([str(texts)], out, vocab_size=300, seed=1, replace=True).fingerprint != first
    assert prepare([str(texts)], out, vocab_size=300, replace=True).fingerprint == first


def test_windows_are_spread_and_come_back(tmp_path: Path) -> None:
    ids = np.arange(101, dtype=np.uint16)
    sample = spread_windows(ids, 10, 5)
    assert sample[:, 0].tolist() == [0, 20, 40, 60, 90]
    assert load_sample(tmp_path) is None
    save_sample(tmp_path, sample, vocab_size=128)
    loaded = load_sample(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded, sample)


def test_a_damaged_sample_is_refused(tmp_path: Path) -> None:
    save_sample(tmp_path, spread_windows(np.arange(101, dtype=np.uint16), 10, 5), vocab_size=128)
    path = tmp_path / "heldout.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"heldout\.safetensors"):
        load_sample(tmp_path)
