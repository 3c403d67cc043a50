"""The page of a circuit: one HTML file to look at it, which opens from disk and needs no network."""

from distill.circuits.viewer.labels import labels_path, read_labels, write_labels
from distill.circuits.viewer.page import Page, render
from distill.circuits.viewer.payload import view
from distill.circuits.viewer.settings import ViewConfig

__all__ = ["Page", "ViewConfig", "labels_path", "read_labels", "render", "view", "write_labels"]
