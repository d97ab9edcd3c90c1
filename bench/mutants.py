"""Small faults that can be put into a module, as places on its syntax tree and the text that goes there instead.

Left alone are what no test should look at: type hints, decorators, formatted texts, what is raised, docstrings.
"""

import ast
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BOUNDARIES = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
DELETED = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    operator: str
    before: str
    """The text of the lines that change, on one line; ``after`` likewise."""
    after: str
    start: int
    """Of the place in the file, in bytes; ``new`` goes there instead of what stands up to ``end``."""
    end: int
    new: str
    key: str
    """The text of the line that it begins on: with file and operator, what an equivalent mutant is known by."""
    killed_by: str | None = None
    seconds: float = 0.0


def known_mutants(entries: Iterable[Mapping[str, str]], root: Path) -> list[Mutant]:
    """Mutants that are written down: ``after`` in the place of ``before``.

    Raises:
        ValueError: the text is not there, or not once.
    """
    found = []
    for entry in entries:
        source = (root / entry["file"]).read_text(encoding="utf-8")
        if source.count(entry["before"]) != 1:
            raise ValueError(f"{entry['file']}: {entry['before']!r} is there {source.count(entry['before'])} times")
        start = len(source[: source.index(entry["before"])].encode())
        line = source.encode()[:start].count(b"\n")
        texts = (" ".join(entry[side].split()) for side in ("before", "after"))
        place = (start, start + len(entry["before"].encode()), entry["after"])
        found.append(Mutant(entry["file"], line + 1, entry["what"], *texts, *place, source.splitlines()[line].strip()))
    return found


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """Each (operator, node to replace, its new text) for this node alone."""

    def swapped(table: Mapping, operators: list[ast.AST], at: int = 0) -> list | None:
        new = table.get(type(operators[at]))
        return [*operators[:at], new(), *operators[at + 1 :]] if new else None

    def with_(**fields) -> str:
        copy = type(node)(**dict(ast.iter_fields(node)) | fields)
        text = ast.unparse(ast.fix_missing_locations(ast.copy_location(copy, node)))
        return f"({text})" if isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp) else text

    match node:
        case ast.Compare():
            for name, table in (("comparison", COMPARISONS), ("boundary", BOUNDARIES)):
                for i in range(len(node.ops)):
                    if ops := swapped(table, node.ops, i):
                        yield name, node, with_(ops=ops)
        case ast.BinOp() | ast.AugAssign():
            texts = [getattr(node, side, None) for side in ("left", "right", "value")]
            text = any(isinstance(t, ast.JoinedStr | ast.Constant) and not _is_number(t) for t in texts if t)
            if not text and (ops := swapped(ARITHMETIC, [node.op])):
                yield "arithmetic", node, with_(op=ops[0])
        case ast.BoolOp():
            yield "and/or", node, with_(op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        case ast.UnaryOp(op=ast.Not()):
            yield "negation", node, f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool()):
            yield "constant", node, str(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", node, repr(node.value + 1 if isinstance(node.value, int) else node.value * 2)
        case ast.Name() if node.id in NAMES:
            yield "min/max", node, NAMES[node.id]
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield "return value", node, "return None"
        case ast.Slice():
            lower = f"({ast.unparse(node.lower)}) + 1" if node.lower else "1"
            upper = f"({ast.unparse(node.upper)}) - 1" if node.upper else "-1"
            for old, new in ((node.lower, lower), (node.upper, upper)):
                if old:
                    yield "slice bound", old, new
            if not node.lower and not node.upper and not node.step:
                yield "slice bound", node, "1:"
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Constant):
        for forced in ("False",) if isinstance(node, ast.While) else ("True", "False"):
            yield "condition", node.test, forced
    if isinstance(node, ast.Call) and len(node.args) + len(node.keywords) > 1:
        for i in range(len(node.keywords)):
            yield "argument", node, with_(keywords=node.keywords[:i] + node.keywords[i + 1 :])
        if node.args:
            yield "argument", node, with_(args=node.args[:-1])
    targets = node.targets if isinstance(node, ast.Assign) else []
    stored = targets and all(isinstance(t, ast.Attribute | ast.Subscript) for t in targets)
    if stored or isinstance(node, DELETED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement", node, "pass"


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but type hints, formatted texts, what is raised, and imports for type checkers."""
    yield node
    skipped = {"annotation", "returns", "decorator_list"} | ({"exc"} if isinstance(node, ast.Raise) else set())
    of_types = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    for name, field in ast.iter_fields(node):
        children = field if isinstance(field, list) else [field]
        for child in [] if name in skipped else children[:1] if of_types and name == "args" else children:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and not typing:
                yield from _walk(child)


def mutants(source: str, file: str = "") -> list[Mutant]:
    """All of a module, in the order of the text."""
    data, lines = source.encode(), source.encode().splitlines(keepends=True)
    begins = [sum(map(len, lines[:i])) for i in range(len(lines))]
    found = []
    for node in _walk(ast.parse(source)):
        for operator, old, new in changes(node):
            start, end = begins[old.lineno - 1] + old.col_offset, begins[old.end_lineno - 1] + old.end_col_offset
            first, last = begins[old.lineno - 1], begins[old.end_lineno - 1] + len(lines[old.end_lineno - 1])
            before, after = data[first:last], data[first:start] + new.encode() + data[end:last]
            texts = [" ".join(text.decode().split()) for text in (before, after, lines[old.lineno - 1])]
            if texts[0] != texts[1]:
                found.append(Mutant(file, old.lineno, operator, *texts[:2], start, end, new, texts[2]))
    return sorted(dict.fromkeys(found), key=lambda m: (m.start, m.end, m.operator, m.new))


def mutated(source: str, mutant: Mutant) -> str:
    data = source.encode()
    return (data[: mutant.start] + mutant.new.encode() + data[mutant.end :]).decode()


def draw(everything: Sequence[Mutant], count: int, seed: str) -> list[Mutant]:
    """So many of them: an operator by chance among those that have some left, then one of its mutants."""
    chance, left, drawn = random.Random(seed), list(everything), []
    while left and len(drawn) < count:
        operator = chance.choice(sorted({mutant.operator for mutant in left}))
        drawn.append(chance.choice([mutant for mutant in left if mutant.operator == operator]))
        left.remove(drawn[-1])
    return drawn
