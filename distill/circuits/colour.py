"""Text coloured by a score, in a terminal and in a page."""

from collections.abc import Sequence
from html import escape

from transformers import PreTrainedTokenizerBase

RESET = "\x1b[0m"
_STYLE = (
    "body{font:15px/1.5 ui-monospace,monospace;margin:2em;max-width:70em;color:#111;background:#fff}"
    "pre.watch{white-space:pre-wrap;word-break:break-word}.watch .flag{outline:1px solid #b00}"
    ".watch span{border-radius:2px}p{font-family:system-ui,sans-serif}"
)


def token_pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; a token that ends inside a character adds nothing, the one that ends it all."""
    pieces, waiting = [], []
    for one in ids:
        waiting.append(one)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        # A character of four bytes is the longest there is; what is still broken then is broken for good.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4:
            pieces.append("")
            continue
        pieces.append(text)
        waiting = []
    if waiting:
        pieces[-1] = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
    return pieces


def _check(pieces: Sequence[str], scores: Sequence[float], largest: float) -> None:
    if len(pieces) != len(scores):
        raise ValueError(f"scores: got {len(scores)} for {len(pieces)} tokens, allowed is one for each")
    if not largest > 0:
        raise ValueError(f"largest: got {largest}, allowed are numbers above 0")


def in_terminal(
    pieces: Sequence[str], scores: Sequence[float], *, threshold: float = float("inf"), largest: float = 3.0
) -> str:
    """The text with a background the redder the higher the score (`largest` and more: the reddest), and blue below 0;
    tokens above the threshold in size are underlined."""
    _check(pieces, scores, largest)
    parts = []
    for piece, score in zip(pieces, scores, strict=True):
        level = round(5 * min(abs(score) / largest, 1.0))
        # The 6 x 6 x 6 cube of 256-colour terminals, from white towards red or blue.
        red, blue = (5, 5 - level) if score >= 0 else (5 - level, 5)
        codes = f"\x1b[30;48;5;{16 + 36 * red + 6 * (5 - level) + blue}m" if level else ""
        codes += "\x1b[4m" if abs(score) > threshold else ""
        # A colour that runs over the end of a line fills the rest of it in many terminals.
        parts.append("\n".join(f"{codes}{line}{RESET}" if codes and line else line for line in piece.split("\n")))
    return "".join(parts)


def as_html(
    pieces: Sequence[str], scores: Sequence[float], *, threshold: float = float("inf"), largest: float = 3.0
) -> str:
    """A fragment of HTML, `<pre class="watch">`, for any page; a token's score is its title. Everything is escaped."""
    _check(pieces, scores, largest)
    spans = []
    for piece, score in zip(pieces, scores, strict=True):
        share = min(abs(score) / largest, 1.0)
        colour = "220,40,40" if score >= 0 else "40,80,220"
        flag = ' class="flag"' if abs(score) > threshold else ""
        style = f"background:rgba({colour},{share:.2f})"
        spans.append(f'<span{flag} style="{style}" title="{score:.3f}">{escape(piece)}</span>')
    return f'<pre class="watch">{"".join(spans)}</pre>'


def as_page(fragment: str, *, title: str, note: str = "") -> str:
    """A page of its own around a fragment of `as_html`; it needs nothing else to be seen."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(note)}</p>{fragment}</body></html>\n"
    )
