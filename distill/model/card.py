"""Model cards made from a model's own record, and the upload of a model folder to the Hugging Face hub.

Nothing in a card is typed by hand: what the model is, how it was trained and on what, and how well it does come from
`config.json` and `manifest.json` in its folder. What these do not say is left out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from distill.artifact import MANIFEST, read_manifest
from distill.model.architecture import SparseTransformerConfig
from distill.model.inspection import read_config
from distill.model.load import model_folder

CARD = "README.md"
WEIGHTS = ".safetensors"
TYPES = (WEIGHTS, ".json", ".txt", ".md", ".bpe", ".model")
"""Endings of files that are uploaded; weights are safetensors and nothing else."""
SHOWN = ("vocab_size", "context", "n_layer", "d_model", "n_head", "d_head", "d_mlp", "norm", "activation",
         "topk_fraction", "position", "sink", "bigram", "tied_unembedding")  # fmt: skip
"""Options of the architecture that a card lists."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is or would be uploaded."""

    repo: str
    """Name on the hub."""
    card: str
    """The model card."""
    files: Mapping[str, int]
    """Name and bytes of each file, without the card."""
    address: str | None
    """Where it is now; None for a dry run."""

    def lines(self) -> str:
        """For people: the files, and where they are or would be."""
        listed = [f"{size:>14,} bytes  {name}" for name, size in {**self.files, CARD: len(self.card.encode())}.items()]
        return "\n".join(
            [*listed, f"uploaded to {self.address}" if self.address else f"would be uploaded to {self.repo}"]
        )


def model_card(
    path_or_name: str | Path, *, license: str | None = None, repo: str | None = None, name: str | None = None
) -> str:
    """The card of a model in a folder, as Markdown with the hub's metadata on top.

    Arguments:
        path_or_name: model folder, run folder, or short name of a shipped model.
        license: identifier of the licence, such as mit; none: the card says none.
        repo: name on the hub, for the lines that show how to load it.
        name: what the card calls it; None: as the hub does, or as its folder is called.

    Raises ValueError for no model folder, ArtifactError (one too) for a manifest that is damaged or of another version.
    """
    folder = _folder(path_or_name)
    config = read_config(folder)
    record = read_manifest(folder, "model", verify=False) if (folder / MANIFEST).is_file() else {}
    known = record.get("provenance", {})
    ours = config.get("model_type") == SparseTransformerConfig.model_type
    tags = ["distill-bridges", "interpretability", *(["weight-sparse"] if ours else [])]
    head = ModelCardData(license=license, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    name = name or (repo or Path(path_or_name).resolve().name).split("/")[-1]
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        _opening(ours, _settings(known).get("kept")),
        _usage(repo or f"path/to/{name}", ours),
        _architecture(config) if ours else "",
        _training(known, record),
        _data(known.get("extra", {}).get("corpus", {})),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def push_to_hub(
    path_or_name: str | Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
) -> Upload:
    """Uploads a model folder with its card.

    Arguments:
        path_or_name: as for `model_card`.
        repo: user/name.
        private: whether a new repository is private.
        dry_run: make everything, upload nothing, and ask the network for nothing.
        token: access token; none: the one that huggingface_hub knows.

    Raises ValueError for a name that is none on the hub, a file of a kind that is not uploaded (weights are safetensors
    only), a folder without weights, and as `model_card`.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"repo: {repo!r} is no name on the hub; allowed are names such as user/model")
    folder = _folder(path_or_name)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == CARD or any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.suffix not in TYPES:
            raise ValueError(f"model: {path} is not uploaded; allowed are files ending in {', '.join(TYPES)}")
        files[name] = path.stat().st_size
    if not any(name.endswith(WEIGHTS) for name in files):
        raise ValueError(f"model: {folder} holds no weights; allowed is a folder with a file ending in {WEIGHTS}")
    card = model_card(path_or_name, license=license, repo=repo)
    if dry_run:
        return Upload(repo=repo, card=card, files=files, address=None)
    hub = HfApi(token=token)
    hub.create_repo(repo, private=private, exist_ok=True)
    hub.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo)
    address = hub.upload_folder(folder_path=folder, repo_id=repo, allow_patterns=list(files))
    return Upload(repo=repo, card=card, files=files, address=str(address))


def _folder(path_or_name: str | Path) -> Path:
    folder = model_folder(path_or_name)
    if folder is None:
        raise ValueError(
            f"model: {path_or_name} is no folder; allowed are a model folder, a run folder, or a shipped name"
        )
    return folder


def _settings(known: Mapping[str, Any]) -> Mapping[str, Any]:
    """How it was trained: `train` in the record of a model, `training` in that of a student, beside its bridges'."""
    config = known.get("config", {})
    found = config.get("train", config.get("training"))
    return found if isinstance(found, Mapping) else {}


def _opening(ours: bool, kept: float | None) -> str:
    if not ours:
        return "A dense language model, trained to be taken apart beside weight-sparse ones."
    if kept == 1:
        return "A dense transformer with the code of weight-sparse ones: what their circuits are compared with."
    return (
        "A weight-sparse transformer: most weights are exactly zero and few channels are active at a time, so that "
        "what it does can be read off as small circuits (Gao et al. 2025, arXiv 2511.13653)."
    )


def _usage(repo: str, ours: bool) -> str:
    first = "import distill  # registers the model with transformers\n" if ours else ""
    return (
        "## Use\n\n```python\n"
        f"{first}from transformers import pipeline\n\n"
        f'pipeline("text-generation", model="{repo}")("for i in range(", max_new_tokens=8)\n'
        "```\n\nWeights are safetensors; `trust_remote_code` is not needed. To find circuits in it: "
        f"`python recipes/prune_circuit.py --model {repo} --corpus stdlib`."
    )


def _architecture(config: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {config[name]} |" for name in SHOWN if name in config]
    return "## Shape\n\n" + "\n".join(["| option | value |", "|---|---|", *rows])


def _training(known: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """How it was made and how well it does, as far as its manifest says."""
    if not known:
        return ""
    extra, train = known.get("extra", {}), _settings(known)
    sparsity = extra.get("sparsity", {})
    facts = {
        "made by": f"`{known['command']}`",
        "converted from": extra.get("openai", {}).get("folder"),
        "held-out loss": _shown(extra.get("heldout_loss"), "{:.3f} nats per token"),
        "trained on": _shown(extra.get("tokens"), "{:,} tokens"),
        "training time": _shown(extra.get("seconds"), "{:,.0f} s"),
        "hardware": extra.get("hardware"),
        "projected weights": _shown(sparsity.get("numel"), "{:,}"),
        "of them not zero": _shown(sparsity.get("kept"), "{:,}"),
        "parameters": _shown(extra.get("parameters"), "{:,}"),
        "parameters not zero": _shown(extra.get("nonzeros"), "{:,}"),
        "kept fraction": _shown(train.get("kept"), "{:.4g}"),
        "steps": _shown(train.get("steps"), "{:,}"),
        "learning rate": _shown(train.get("learning_rate"), "{:.3g}"),
        "seed": known.get("seed"),
        "data fingerprint": _shown(known.get("data"), "`{:.12}`"),
        "made on": extra.get("made", record.get("created")),
        "made with": ", ".join(
            f"{name} {version}" for name, version in extra.get("made_with", record.get("versions", {})).items()
        ),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value not in (None, "")]
    settings = f"\n\nAll settings:\n\n```json\n{json.dumps(train)}\n```" if train else ""
    return "## Training\n\n" + "\n".join(["| what | value |", "|---|---|", *rows]) + settings


def _shown(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def _data(corpus: Mapping[str, Any]) -> str:
    """What text it was trained on, with the licences that are known."""
    sources = corpus.get("sources", [])
    if not sources:
        return ""
    rows = [
        f"| {one.get('source', '')} | {one.get('files', '')} | {one.get('bytes', '')} | {one.get('licence') or ''} |"
        for one in sources
    ]
    licences = corpus.get("licences")
    last = f"\n\nLicences of the text: {', '.join(licences)}." if licences else ""
    return "## Text\n\n" + "\n".join(["| source | files | bytes | licence |", "|---|---|---|---|", *rows]) + last
