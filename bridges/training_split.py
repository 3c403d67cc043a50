"""Which files the training of a dense model behind a student held out."""

from bridges.folder import DENSE, DenseRecord
from bridges.lineup import bridge_folder
from distill.artifact import read_json
from distill.circuits.subject import Subject
from distill.circuits.training_split import TrainingSplit, training_split


def dense_split(dense: Subject, bridge: str) -> TrainingSplit | None:
    """The split that the dense model of `load_pair(bridge)` was trained with; None where nothing says."""
    folder = bridge_folder(bridge)
    known = read_json(folder / DENSE, what="dense model record")
    known.pop("student", None)
    return training_split(dense, [DenseRecord(**known).found_from(folder).name])
