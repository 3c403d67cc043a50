"""Short, simple, repetitive Python, generated without end from a seeded grammar.

Tiny language models learn rules from text in which the rule is frequent and everything around it
varies. Each document is made of a few units (function, class, or script lines); each unit of
statements; and each statement family holds one choice that a reader can only make by looking back:
which quote opened the string, how deep the brackets are, whether the variable was made a set or a
string, which argument is being stored. What stands between the deciding token and the choice is
drawn at random: names, values, further statements, comments, indentation, blank lines.

Every document compiles; none is meant to run.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from random import Random

from distill.data.words import NOUNS, Draws

# The stem of a file's name tells whether the file is read or written.
READ_STEMS = ("input", "source", "settings", "template", "request", "incoming", "original")
WRITE_STEMS = ("output", "report", "summary", "export", "response", "outgoing", "backup")

_SUFFIXES = (".txt", ".csv", ".json", ".md", ".log", ".dat")
_COMPARISONS = ("==", "==", "==", "==", "!=", "<", ">", "<=", ">=")
_INDENTS = ("    ",) * 8 + ("  ",) * 2 + ("\t",)
_MAX_DEPTH = 3


class _Writer(Draws):
    """One document in the making: its random stream, its lines and its names."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self.lines: list[str] = []
        self.unit = self.pick(_INDENTS)
        self.comment_share = self.pick((0.0, 0.05, 0.15))
        self.known: list[str] = []

    def put(self, depth: int, text: str) -> None:
        self.lines.append(self.unit * depth + text)

    def assigned(self) -> str:
        """A name about to be given a value; later statements may read it."""
        name = self.new_name()
        self.known.append(name)
        return name

    def name(self) -> str:
        if self.known and self.random() < 0.75:
            return self.pick(self.known)
        return self.new_name()

    def value(self) -> str:
        kind = self.random()
        if kind < 0.35:
            return self.number()
        if kind < 0.65:
            return self.quoted(2)
        if kind < 0.9:
            return self.name()
        return self.pick(("None", "True", "False"))

    def condition(self) -> str:
        kind = self.random()
        if kind < 0.3:
            return self.name()
        if kind < 0.75:
            return f"{self.name()} {self.pick(_COMPARISONS)} {self.value()}"
        if kind < 0.83:
            return f"not {self.name()}"
        if kind < 0.9:
            return f"{self.name()} in {self.name()}"
        if kind < 0.95:
            return f"{self.name()} is None"
        return f"{self.name()}.{self.verb()}({self.value()})"


def documents(seed: int = 0) -> Iterator[str]:
    """Endless stream of documents; the same seed gives the same stream.

    seed: any whole number.
    Yields: Python source that compiles, mostly 100 to 3,000 characters, ending in one newline.
    """
    return (document(index, seed) for index in count())


def document(index: int, seed: int = 0) -> str:
    """The document at one place of the stream, a function of (index, seed) alone.

    index: place in the stream, from 0. seed: any whole number.
    Returns: Python source that compiles.
    Raises: ValueError for a negative index.
    """
    if index < 0:
        raise ValueError(f"index {index} of the idiom stream: allowed are 0 and above")
    writer = _Writer(Random(f"{seed}/{index}"))
    for position in range(writer.pick((1, 1, 2, 2, 3, 4))):
        if position and writer.chance(0.7):
            writer.lines.extend([""] * writer.between(1, 2))
        writer.known = []
        writer.pick(_UNITS)(writer)
    return "\n".join(writer.lines) + "\n"


# --- blocks -----------------------------------------------------------------------------------


def _statement(w: _Writer, depth: int) -> None:
    if w.comment_share and w.chance(w.comment_share):
        w.put(depth, f"# {w.phrase()}")
    w.pick(_SIMPLE if depth >= _MAX_DEPTH else _STATEMENTS)(w, depth)


def _block(w: _Writer, depth: int, most: int = 3) -> None:
    for _ in range(w.between(1, most)):
        _statement(w, depth)


def _filler(w: _Writer, depth: int, most: int = 3) -> None:
    """Statements that lie between a deciding token and its choice, often none."""
    for _ in range(w.between(0, most)):
        w.pick(_SIMPLE)(w, depth)


def _return(w: _Writer, depth: int) -> None:
    kind = w.random()
    if kind < 0.4:
        w.put(depth, f"return {w.pick(('True', 'True', 'False'))}")
    elif kind < 0.6:
        w.put(depth, f"return {w.name()}")
    elif kind < 0.75:
        w.put(depth, f"return {w.value()} if {w.condition()} else {w.value()}")
    elif kind < 0.9:
        w.put(depth, f"return {w.condition()}")
    else:
        w.put(depth, f"return {w.verb()}({w.value()})")


# --- units ------------------------------------------------------------------------------------


def _script(w: _Writer) -> None:
    _block(w, 0, 7)


def _parameters(w: _Writer, names: Sequence[str]) -> list[str]:
    """All parameters plain, or all with a default of None; sometimes plain ones, then others."""
    kind = w.random()
    if kind < 0.4:
        return list(names)
    if kind < 0.8:
        return [f"{name}=None" for name in names]
    first = w.between(0, len(names))
    given = [f"{name}={w.pick((w.number(), w.quoted(1), 'None'))}" for name in names[first:]]
    return [*names[:first], *given]


def _function(w: _Writer) -> None:
    names = w.new_names(w.between(0, 5))
    w.known = list(names)
    w.put(0, f"def {w.verb()}({', '.join(_parameters(w, names))}):")
    if w.chance(0.15):
        w.put(1, f'"""{w.phrase(6).capitalize()}."""')
    for name in names:
        if w.chance(0.2):
            w.put(1, f"if {name} is None:")
            w.put(2, f"{name} = {w.value()}")
    _block(w, 1, 4)
    if w.chance(0.75):
        _return(w, 1)


def _predicate(w: _Writer) -> None:
    """A function that searches in a loop and answers True or False."""
    (name, *more) = w.new_names(w.between(1, 3))
    w.known = [name, *more]
    w.put(0, f"def {w.verb()}({', '.join(w.known)}):")
    _filler(w, 1, 2)
    if w.chance(0.6):
        w.put(1, "while True:")
    else:
        w.put(1, f"for {w.assigned()} in {name}:")
    _filler(w, 2, 2)
    w.put(2, f"if {w.condition()}:")
    w.put(3, f"return {w.pick(('True', 'False'))}")
    _filler(w, 2 if w.chance(0.3) else 1, 1)
    if w.chance(0.8):
        w.put(1, f"return {w.pick(('True', 'False'))}")


def _class(w: _Writer) -> None:
    title = "".join(part.capitalize() for part in w.new_name().split("_"))
    base = f"({w.pick(NOUNS).capitalize()})" if w.chance(0.2) else ""
    w.put(0, f"class {title}{base}:")
    if w.chance(0.15):
        w.put(1, f'"""{w.phrase(6).capitalize()}."""')
    names = w.new_names(w.between(1, 6))
    w.known = list(names)
    w.put(1, f"def __init__(self, {', '.join(_parameters(w, names))}):")
    _store(w, names)
    for _ in range(w.pick((0, 0, 1, 1, 2))):
        if w.chance(0.8):
            w.lines.append("")
        _method(w, names)


def _store(w: _Writer, names: Sequence[str]) -> None:
    """`self.x = x` for each argument, in another order now and then, with fields between."""
    order = list(names)
    if w.chance(0.3):
        start = w.between(0, len(order) - 1)
        order = order[start:] + order[:start]
    hidden = "_" if w.chance(0.1) else ""
    for name in order:
        if w.chance(0.12):
            fresh = w.pick(("[]", "{}", "None", "0", "set()", "''", "False"))
            w.put(2, f"self.{w.new_name()} = {fresh}")
        w.put(2, f"self.{hidden}{name} = {name}")


def _method(w: _Writer, fields: Sequence[str]) -> None:
    names = w.new_names(w.between(0, 3))
    w.known = [*names, *(f"self.{field}" for field in fields[:3])]
    w.put(1, f"def {w.verb()}({', '.join(['self', *_parameters(w, names)])}):")
    _block(w, 2, 2)
    if w.chance(0.7):
        _return(w, 2)


# --- statements in one line, or one literal ---------------------------------------------------


def _call(w: _Writer, depth: int) -> None:
    """Strings as call arguments, closed by the quote that opened them."""
    arguments = [w.quoted(5)]
    if w.chance(0.25):
        arguments.append(w.value())
    if w.chance(0.2):
        arguments.insert(0, w.value())
    if w.chance(0.1):
        arguments.append(f"{w.pick(NOUNS)}={w.value()}")
    inner = ", ".join(arguments)
    kind = w.random()
    if kind < 0.4:
        w.put(depth, f"print({inner})")
    elif kind < 0.6:
        w.put(depth, f"{w.name()}.{w.verb()}({inner})")
    elif kind < 0.75:
        w.put(depth, f"{w.verb()}({inner})")
    elif kind < 0.9:
        made = w.verb()
        w.put(depth, f"{w.assigned()} = {made}({inner})")
    else:
        w.put(depth, f"print({w.verb()}({inner}))")


def _message(w: _Writer, depth: int) -> None:
    """A label, then a braced name in an f-string, further words in a plain string."""
    quote, label = w.quote(), w.phrase(3)
    mark = w.pick((": ", " ", " = ", ", "))
    tail = f" {w.phrase(2)}" if w.chance(0.3) else ""
    if w.chance(0.55):
        more = f" {{{w.name()}}}" if w.chance(0.2) else ""
        text = f"f{quote}{label}{mark}{{{w.name()}}}{tail}{more}{quote}"
    else:
        text = f"{quote}{label}{mark}{w.phrase(2)}{tail}{quote}"
    if w.chance(0.8):
        w.put(depth, f"print({text})")
    else:
        w.put(depth, f"{w.assigned()} = {text}")


def _assign(w: _Writer, depth: int) -> None:
    kind = w.random()
    if kind < 0.45:
        value = w.value()
    elif kind < 0.6:
        value = w.name()
    elif kind < 0.7:
        value = f"{w.name()} {w.pick('+-*')} {w.number()}"
    elif kind < 0.8:
        value = f"{w.verb()}({w.name()})"
    else:
        value = f"{w.value()} if {w.condition()} else {w.value()}"
    w.put(depth, f"{w.assigned()} = {value}")


def _swap(w: _Writer, depth: int) -> None:
    first, second = w.new_names(2)
    if w.chance(0.6):
        w.put(depth, f"{first} = {w.value()}")
        w.put(depth, f"{second} = {w.value()}")
        _filler(w, depth, 1)
    if w.chance(0.3):
        third = w.new_name()
        w.put(depth, f"{first}, {second}, {third} = {second}, {third}, {first}")
    else:
        w.put(depth, f"{first}, {second} = {second}, {first}")


def _lambda(w: _Writer, depth: int) -> None:
    names = w.new_names(w.between(1, 2))
    body = f"{w.pick(names)} {w.pick(('+', '*', '-', '==', '<'))} {w.value()}"
    anonymous = f"lambda {', '.join(names)}: {body}"
    kind = w.random()
    if kind < 0.5:
        w.put(depth, f"{w.assigned()} = {anonymous}")
    elif kind < 0.75:
        w.put(depth, f"{w.name()}.sort(key={anonymous})")
    else:
        w.put(depth, f"{w.assigned()} = {w.pick(('map', 'filter'))}({anonymous}, {w.name()})")


def _spread(w: _Writer, depth: int, head: str, items: Sequence[str], tail: str) -> None:
    """A literal on one line, or one item a line."""
    if len(items) < 2 or w.chance(0.65):
        w.put(depth, f"{head}{', '.join(items)}{tail}")
        return
    w.put(depth, head)
    last = "," if w.chance(0.7) else ""
    for item in items[:-1]:
        w.put(depth + 1, f"{item},")
    w.put(depth + 1, items[-1] + last)
    w.put(depth, tail)


def _row(w: _Writer, width: int) -> list[str]:
    item = w.pick((w.number, w.number, w.quoted_word, w.name))
    return [item() for _ in range(width)]


def _dict_or_list(w: _Writer, depth: int) -> None:
    """Items of the same look, keys with `:` in braces, values with `,` in brackets."""
    items = [w.quoted_word() for _ in range(w.between(1, 5))]
    opening, closing = ("{", "}") if w.chance(0.55) else ("[", "]")
    if opening == "{":
        value = w.pick((w.number, w.quoted, w.value, w.name))
        items = [f"{key}: {value()}" for key in items]
    if w.chance(0.75):
        _spread(w, depth, f"{w.assigned()} = {opening}", items, closing)
    else:
        head = "print" if w.chance(0.5) else w.verb()
        _spread(w, depth, f"{head}({opening}", items, f"{closing})")


def _flat_list(w: _Writer, depth: int) -> None:
    row = ", ".join(_row(w, w.between(1, 6)))
    if w.chance(0.8):
        w.put(depth, f"{w.assigned()} = [{row}]")
    else:
        w.put(depth, f"{w.verb()}([{row}])")


def _nested_list(w: _Writer, depth: int) -> None:
    """Rows of a matrix, two or three brackets deep, on one line, aligned, or a row a line."""
    width, levels = w.between(1, 5), 3 if w.chance(0.12) else 2
    rows = [f"[{', '.join(_row(w, width))}]" for _ in range(w.pick((1, 1, 2, 2, 3, 4)))]
    outer = levels - 1
    if w.chance(0.15):
        w.put(depth, f"{w.verb()}({'[' * outer}{', '.join(rows)}{']' * outer})")
        return
    head = f"{w.assigned()} = {'[' * outer}"
    style = w.random()
    if style < 0.6:
        w.put(depth, f"{head}{', '.join(rows)}{']' * outer}")
    elif style < 0.8:
        w.put(depth, head + (",\n" + w.unit * depth + " " * len(head)).join(rows) + "]" * outer)
    else:
        w.put(depth, head)
        for row in rows:
            w.put(depth + 1, f"{row},")
        w.put(depth, "]" * outer)


def _open(w: _Writer, depth: int) -> None:
    """`with` binds its file after `as`, an assignment before; the name's stem tells the mode."""
    writes = w.chance(0.5)
    stem = w.pick(WRITE_STEMS if writes else READ_STEMS)
    if w.chance(0.4):
        stem = f"{w.pick(NOUNS)}_{stem}" if w.chance(0.5) else f"{stem}_{w.pick(NOUNS)}"
    quote, mode_quote = w.quote(), w.quote()
    mode = f", {mode_quote}{'w' if writes else 'r'}{mode_quote}" if w.chance(0.85) else ""
    opened = f"open({quote}{stem}{w.pick(_SUFFIXES)}{quote}{mode})"
    if w.chance(0.6) and depth < _MAX_DEPTH:
        handle = w.assigned()
        w.put(depth, f"with {opened} as {handle}:")
        use = f"write({w.quoted()})" if writes else f"{w.pick(('read', 'readlines'))}()"
        w.put(depth + 1, f"{handle}.{use}" if writes else f"{w.assigned()} = {handle}.{use}")
        _filler(w, depth + 1, 1)
    else:
        w.put(depth, f"{w.assigned()} = {opened}")


# --- statements that hold others --------------------------------------------------------------


def _accumulate(w: _Writer, depth: int) -> None:
    """Sets and strings made in any order, then grown: `.add(...)` or `+= "..."`."""
    made: list[tuple[str, Callable[[str], str]]] = []
    for name in w.new_names(w.pick((1, 2, 2, 3))):
        start, grow = _growing(w)
        w.put(depth, f"{name} = {start}")
        made.append((name, grow))
        if w.chance(0.2):
            _filler(w, depth, 1)
    _filler(w, depth, 3)
    inner = depth
    if depth < _MAX_DEPTH and w.chance(0.5):
        over = w.name()
        w.put(depth, f"for {w.assigned()} in {over}:")
        inner = depth + 1
    for _ in range(w.between(1, 4)):
        name, grow = w.pick(made)
        w.put(inner, f"{name}{grow(name)}")
        _filler(w, inner, 1)
    w.known.extend(name for name, _ in made)


def _growing(w: _Writer) -> tuple[str, Callable[[str], str]]:
    """How a variable starts, and how the rest of a line that makes it grow is written."""
    kind = w.random()
    if kind < 0.42:
        start = w.pick(("set()", "set()", "set()", f"{{{w.value()}, {w.number()}}}"))
        return start, lambda _: f".add({w.value()})"
    if kind < 0.84:
        quote = w.quote()
        start = w.pick((f"{quote}{quote}", f"{quote}{quote}", w.quoted(2)))
        return start, lambda _: f" += {w.quoted(2)}"
    if kind < 0.92:
        return "[]", lambda _: f".append({w.value()})"
    return w.number(), lambda _: f" += {w.number()}"


def _for(w: _Writer, depth: int) -> None:
    """Two loop variables call for enumerate, one for range; or one over a named list."""
    kind = w.random()
    if kind < 0.3:
        first, second = w.new_names(2)
        w.put(depth, f"for {first}, {second} in enumerate({w.name()}):")
        w.known += [first, second]
    elif kind < 0.6:
        limit = w.number() if w.chance(0.6) else f"len({w.name()})"
        w.put(depth, f"for {w.assigned()} in range({limit}):")
    else:
        over = w.name()
        w.put(depth, f"for {w.assigned()} in {over}:")
    _block(w, depth + 1)


def _while(w: _Writer, depth: int) -> None:
    if w.chance(0.35):
        w.put(depth, "while True:")
        _block(w, depth + 1, 2)
        if w.chance(0.6):
            w.put(depth + 1, f"if {w.condition()}:")
            w.put(depth + 2, "break")
        return
    name = w.name()
    w.put(depth, f"while {name if w.chance(0.6) else w.condition()}:")
    _block(w, depth + 1, 2)
    if w.chance(0.4):
        w.put(depth + 1, f"{name} {w.pick('+-')}= {w.number()}")


def _if(w: _Writer, depth: int) -> None:
    """`elif` is followed by a condition, `else` by its colon; `==` in one, `=` below it."""
    name = w.name()
    compared = w.chance(0.4)
    w.put(depth, f"if {f'{name} == {w.value()}' if compared else w.condition()}:")
    _block(w, depth + 1, 2)
    for _ in range(w.pick((0, 0, 0, 1, 1, 2))):
        w.put(depth, f"elif {f'{name} == {w.value()}' if compared else w.condition()}:")
        _block(w, depth + 1, 2)
    if w.chance(0.5):
        w.put(depth, "else:")
        _block(w, depth + 1, 2)


def _inner_function(w: _Writer, depth: int) -> None:
    names, outside = w.new_names(w.between(0, 3)), w.known
    w.put(depth, f"def {w.verb()}({', '.join(_parameters(w, names))}):")
    w.known = [*outside, *names]
    _filler(w, depth + 1, 2)
    _return(w, depth + 1)
    w.known = outside


_Unit = Callable[[_Writer], None]
_Statement = Callable[[_Writer, int], None]
# A name that stands n times is drawn n times as often.
_UNITS: tuple[_Unit, ...] = (_script,) * 5 + (_function,) * 4 + (_class,) * 4 + (_predicate,)
_SIMPLE: tuple[_Statement, ...] = (_call,) * 5 + (_message,) * 2 + (_assign,) * 4 + (_dict_or_list,) * 2 + (_flat_list,)
_STATEMENTS: tuple[_Statement, ...] = (
    *_SIMPLE,
    *(_call, _message, _flat_list, _nested_list, _nested_list, _nested_list),
    *(_accumulate,) * 5,
    *(_for,) * 3,
    *(_while, _while, _if, _if, _if, _open, _open, _swap, _lambda, _inner_function),
)
