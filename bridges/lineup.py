"""The models of a comparison: sparse models, their dense counterparts, a student with bridges and its dense model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bridges.folder import BRIDGES, METRICS_FILE, MODEL, load_bridged
from bridges.folder import DENSE as DENSE_FILE
from bridges.maps import Bridges
from bridges.ratios import DENSE, SPARSE, arm_name
from distill.artifact import fresh_folder, read_manifest, write_json
from distill.circuits.subject import Subject, load_subject
from distill.model.card import CARD
from distill.model.load import SHIPPED
from distill.shipping import as_stored, ship, shipped_provenance
from distill.training.evaluate import heldout_loss

NO_BRIDGE = "none"
STUDENT, TEACHER = "student", "dense_gpt2"
"""What tables call the student and the dense model it was fitted to."""


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """Models ready to be compared."""

    subjects: list[Subject]
    """sparse, further seeds of it as sparse_2 and so on, dense likewise, and with a bridge dense_gpt2 and student."""
    bridges: Bridges | None
    """Between the last two."""

    def subject(self, name: str) -> Subject | None:
        """The model of that name, None where it is not among them."""
        return next((subject for subject in self.subjects if subject.name == name), None)


def load_lineup(
    sparse: str | tuple[str, ...],
    dense: str | tuple[str, ...],
    bridge: str = NO_BRIDGE,
    *,
    corpus: Sequence[str] = (),
    device: str = "cpu",
) -> Lineup:
    """Loads the models by folder or short name; `bridge` is a folder by `fit_bridges`, a short name, or none.

    Arguments:
        sparse, dense: one model, or several of different seeds.

    ValueError for what cannot be loaded, no model or the same one twice in an arm, two tokenizers in the pair, and
    bridges of another dense model.
    """
    subjects: list[Subject] = []
    for field, arm, given in (("model", SPARSE, sparse), ("dense", DENSE, dense)):
        places = (given,) if isinstance(given, str) else given
        if not places or len(set(places)) < len(places):
            raise ValueError(f"{field}: got {list(places)}; allowed are one or more models, each once")
        for index, place in enumerate(places):
            one = load_subject(place, name=arm_name(arm, index), corpus=corpus, device=device)
            subjects.append(one)
            if one.tokenizer.get_vocab() != subjects[0].tokenizer.get_vocab():
                raise ValueError(
                    f"{field}: {place} has another tokenizer than the first model; losses per token cannot be compared"
                )
    if bridge == NO_BRIDGE:
        return Lineup(subjects=subjects, bridges=None)
    teacher, student, bridges = load_pair(bridge, corpus=corpus, device=device)
    return Lineup(subjects=[*subjects, teacher, student], bridges=bridges)


def load_pair(bridge: str, *, corpus: Sequence[str] = (), device: str = "cpu") -> tuple[Subject, Subject, Bridges]:
    """A dense model, its student, and the bridges between them, by the folder or short name of the student.

    ValueError for what cannot be loaded, and bridges of another dense model.
    """
    folder = bridge_folder(bridge)
    _, bridges, info = load_bridged(folder)
    student = load_subject(folder / MODEL, name=STUDENT, corpus=corpus, device=device)
    # A dense model that somebody else trained brings no text; the student's is of the same tokenizer.
    teacher = load_subject(info.source, name=TEACHER, sample=student.sample, device=device)
    info.dense.check(teacher.model, info.dense.name)
    return teacher, student, bridges.to(next(student.model.parameters()).device)


def bridge_folder(bridge: str) -> Path:
    """The folder of a student with bridges: itself, or a shipped one by its short name. ValueError for any other."""
    folder = SHIPPED / bridge if (SHIPPED / bridge).is_dir() and not Path(bridge).is_dir() else Path(bridge)
    if not (folder / MODEL).is_dir() or not (folder / DENSE_FILE).is_file():
        raise ValueError(f"bridge: {bridge} holds no student; allowed are folders by fit_bridges, or {NO_BRIDGE}")
    return folder


def ship_bridged(folder: Path, out: Path, *, dense: str | None = None, bigram: str = "float16") -> Path:
    """Copies what `fit_bridges` made to `out`, without checkpoints, the student shipped as any model (`ship`).

    The student's card stands in `out` itself. The metrics are those that were measured where the bridges were fitted:
    of the student before its table was rounded.

    Args:
        folder: what `fit_bridges` made, or a shipped one.
        out: folder to make; an earlier one is replaced.
        dense: where the dense model is to be found from now on: a folder or a short name; None: where it was.
        bigram: how the student's bigram table is stored (`SparseTransformer.save_compact`).

    ValueError for a folder that is not whole (`ArtifactError`), and a dense model that is not there or another one.
    """
    _, bridges, info = load_bridged(folder)
    record = info.dense if dense is None else replace(info.dense, name=dense)
    record.load()
    subject = load_subject(folder / MODEL, name=STUDENT)
    student = as_stored(subject.model, bigram)
    measured = {"heldout_loss": heldout_loss(student, subject.sample)}
    provenance = shipped_provenance(read_manifest(folder, "bridge"), "bridge", measured)
    with fresh_folder(out, provenance, replace=True) as place:
        ship(folder / MODEL, place / MODEL, bigram=bigram, name=out.resolve().name)
        (place / MODEL / CARD).rename(place / CARD)
        bridges.save(place / BRIDGES)
        write_json(place / METRICS_FILE, info.metrics)
        write_json(place / DENSE_FILE, {**record.stored(place), "student": student.fingerprint()})
    return out
