"""Other people's formats: OpenAI's checkpoints, tokenizer and circuits; see README.md beside this file."""

from distill.formats.folder import import_checkpoint, write_openai
from distill.formats.tokenizer import read_tokenizer, write_tokenizer
from distill.formats.viz import VizSettings, export_viz, viz_payload
from distill.formats.viz_import import import_viz, kept_nodes, read_viz

__all__ = [
    "VizSettings",
    "export_viz",
    "import_checkpoint",
    "import_viz",
    "kept_nodes",
    "read_tokenizer",
    "read_viz",
    "viz_payload",
    "write_openai",
    "write_tokenizer",
]
