"""One plain Python function that every backend inlines: the check at decoration, the fingerprint, the torch form.

    score_mod   (score, b, h, q_idx, kv_idx, *tables) -> score      changes a scaled score, before softmax
    mask_mod    (b, h, q_idx, kv_idx, *tables) -> bool              which keys a query sees, beside causal and window
    activation  (score, b, h, q_idx, kv_idx, *tables) -> weight     replaces softmax: out = sum_j weight_j v_j

A backend takes the function's code object and gives it other globals, in which `m` is the backend's own module of
functions; nothing is copied or generated. So the code must mean the same everywhere, and whatever would not is refused
when the function is decorated: statements other than assignments and one return, operators that languages disagree
about, calls of anything but `m`, and names that are neither parameters nor numbers.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import CellType, FunctionType
from typing import Any, Literal, overload

import torch

from openmla.core.errors import ModError
from openmla.mods import math

Kind = Literal["score_mod", "mask_mod", "activation"]
PARAMETERS: dict[str, tuple[str, ...]] = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
    "activation": ("score", "b", "h", "q_idx", "kv_idx"),
}
MAX_INDICES = 3  # of m.load
Scalar = bool | int | float


@dataclass(frozen=True, eq=False)
class Mod:
    """A checked function. Equal to another if fingerprints are: same code, same captured numbers, same kind.

    Called plainly it runs in PyTorch: it is its own oracle.
    """

    kind: Kind
    name: str
    function: Callable[..., Any]
    math_name: str | None  # under which name it knows `openmla.mods.m`; None: it calls nothing
    captured: tuple[tuple[str, Scalar], ...]  # in order of name
    tables: tuple[tuple[str, int], ...]  # (parameter, number of indices) of the tensors it reads
    fingerprint: str
    window: int = 0  # of a mask_mod: it shows at most the last `window` keys up to the query; 0 promises nothing
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)  # tables bound by `aux`

    @cached_property
    def plain(self) -> FunctionType:
        """The form for PyTorch."""
        return self.rebound(math)

    @cached_property
    def bare(self) -> Mod:
        """Without tensors, which would live as long as the problem that the mod is part of."""
        return replace(self, given={}) if self.given else self

    def rebound(self, functions: Any, number: Callable[[Scalar], Any] = lambda value: value) -> FunctionType:
        """The same code where `m` is `functions` and a captured number is `number(value)`: how a backend inlines it.

        Neither what the module has changed since decoration nor anything else of it can be seen from inside.
        """
        captured = {name: number(value) for name, value in self.captured}
        code = self.function.__code__
        cells = tuple(CellType(captured.get(name)) for name in code.co_freevars)
        names = {"__name__": self.function.__module__, "__builtins__": {}, **captured}
        if self.math_name is not None:
            names[self.math_name] = functions
            cells = tuple(
                CellType(functions) if name == self.math_name else cell
                for name, cell in zip(code.co_freevars, cells, strict=True)
            )
        found = FunctionType(code, names, code.co_name, None, cells)
        found.__qualname__, found.__doc__ = f"{self.name}_{self.fingerprint}", self.function.__doc__
        return found

    def __call__(self, *arguments: Any) -> Any:
        """The function itself, in PyTorch; numbers are those of the moment of decoration."""
        return self.plain(*arguments)

    def aux(self, **tables: torch.Tensor) -> Mod:
        """The same mod with its tensors: `bias.aux(slopes=slopes)`. Tensors are no part of the fingerprint.

        Raises:
            ModError: a name is not one of the function's table parameters.
        """
        known = [name for name, _ in self.tables]
        strangers = sorted(set(tables) - set(known))
        if strangers:
            has = f"it has: {', '.join(known)}" if known else "it reads none"
            raise ModError(self.name, [f"no table is called {', '.join(strangers)}; {has}"])
        return replace(self, given={**self.given, **tables})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mod) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.captured)
        return f"{self.name}({values})" if values else self.name


def score_mod(function: Callable[..., Any]) -> Mod:
    """Decorator: changes each score. `score` is softmax_scale * <q, k> in natural units; what is returned goes on.

    A score that is not finite is not shown to the function. Returning -inf hides the key, NaN makes the row NaN.

    Raises:
        ModError: the function breaks a rule of `openmla.mods.function`; every one is listed.
    """
    return _checked("score_mod", function)


@overload
def mask_mod(function: Callable[..., Any], *, window: int = 0) -> Mod: ...
@overload
def mask_mod(function: None = None, *, window: int = 0) -> Callable[[Callable[..., Any]], Mod]: ...
def mask_mod(
    function: Callable[..., Any] | None = None, *, window: int = 0
) -> Mod | Callable[[Callable[..., Any]], Mod]:  # fmt: skip
    """Decorator: says which keys a query sees, beside what is_causal and window hide. Raises ModError.

    `@mask_mod(window=w)` promises that the function hides every key behind the query, and every key in front of its last
    w: kernels then skip the tiles that hold none of those. A promise that does not hold hides keys.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ModError("mask_mod", [f"window must be a number of keys, or 0 to promise nothing, got {window!r}"])
    if function is None:
        return lambda given: replace(_checked("mask_mod", given), window=window)
    return replace(_checked("mask_mod", function), window=window)


def activation(function: Callable[..., Any]) -> Mod:
    """Decorator: the weight of a score in place of softmax; out = sum_j weight_j v_j, lse = ln sum_j weight_j.

    A score of -inf has weight 0 without being shown to the function; NaN and +inf make the row NaN. Raises ModError.
    """
    return _checked("activation", function)


def _checked(kind: Kind, function: Callable[..., Any]) -> Mod:
    name = getattr(function, "__name__", str(function))
    if not inspect.isfunction(function):
        raise ModError(name, [f"must be a plain Python function, got {type(function).__name__}"])
    if hasattr(function, "__wrapped__"):
        raise ModError(
            name, ["is wrapped by another decorator, whose work would be lost; apply it to the bare function"]
        )
    tree = _parse(name, function)
    reader = _Reader(kind, tree, _captures(function))
    if reader.broken:
        raise ModError(name, list(dict.fromkeys(reader.broken)))
    captured = tuple(sorted(reader.captured.items()))
    tables = tuple((each, reader.tables[each]) for each in reader.extra)
    body = "\n".join(ast.dump(line) for line in reader.lines)
    text = f"{kind}|{[each.arg for each in tree.args.args]}|{body}|{reader.math_name}|{captured!r}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Mod(kind, name.lstrip("_"), function, reader.math_name, captured, tables, fingerprint)


def _parse(name: str, function: Callable[..., Any]) -> ast.FunctionDef:
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise ModError(name, ["its source cannot be read; put it into a file or a notebook cell"]) from error
    try:
        first = ast.parse(source).body[0]
    except SyntaxError:
        first = ast.Pass()
    if not isinstance(first, ast.FunctionDef):
        raise ModError(name, ["must be written with `def`; a lambda cannot be compiled by every backend"])
    return first


def _captures(function: Callable[..., Any]) -> dict[str, Any]:
    """What free names mean: the module's, or those of the enclosing function."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    enclosed = {}
    for name, cell in cells:
        try:
            enclosed[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return {**function.__globals__, **enclosed}


_SAFE_OPERATORS = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.BitAnd, ast.BitOr, ast.BitXor, ast.USub, ast.UAdd, ast.Invert, ast.Eq,
    ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
)  # fmt: skip
_INSTEAD = {
    ast.FloorDiv: "`//` rounds differently in other languages; use m.floordiv(a, b)",
    ast.Mod: "`%` has another sign in other languages; use m.mod(a, b)",
    ast.Pow: "`**` is not known everywhere; multiply, or use m.exp2",
    ast.IfExp: "`a if c else b` asks for one answer for all keys; use m.where(c, a, b)",
    ast.BoolOp: "`and` / `or` ask for one answer for all keys; use & and | with parentheses",
    ast.Not: "`not` asks for one answer for all keys; use ~",
    ast.Subscript: "`table[i]` is not known everywhere; use m.load(table, i)",
    ast.Lambda: "a function inside the function cannot be inlined",
    ast.ListComp: "a comprehension cannot be inlined",
    ast.GeneratorExp: "a comprehension cannot be inlined",
    ast.NamedExpr: "`:=` cannot be inlined; assign on a line of its own",
}


class _Reader:
    """Reads a function once: broken rules, captured numbers, tables and how they are indexed."""

    def __init__(self, kind: Kind, tree: ast.FunctionDef, names: dict[str, Any]) -> None:
        self.broken: list[str] = []
        self.captured: dict[str, Scalar] = {}
        self.tables: dict[str, int] = {}
        self.math_name: str | None = None
        self._names = names
        self._base = tree.lineno
        self.extra = self._parameters(kind, tree.args)
        self._local = set(PARAMETERS[kind])
        assigned = {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._own = {*self._local, *self.extra, *assigned}  # names that mean nothing outside of the function
        has_docstring = ast.get_docstring(tree) is not None
        self.lines = tree.body[1:] if has_docstring else tree.body
        for line in self.lines[:-1]:
            if self._holds(
                isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name),
                line, "only `name = expression` may stand before the return",
            ):  # fmt: skip
                assert isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
                self._expression(line.value)
                target = line.targets[0].id
                self._holds(
                    target not in self.extra and self._names.get(target) is not math, line,
                    f"{target} is a table or the functions, and cannot be assigned",
                )  # fmt: skip
                self._local.add(target)
        last = self.lines[-1] if self.lines else tree
        if self._holds(
            isinstance(last, ast.Return) and last.value is not None, last, "must end with `return expression`"
        ):
            assert isinstance(last, ast.Return) and last.value is not None
            self._expression(last.value)
        unread = [each for each in self.extra if each not in self.tables]
        self._holds(
            not unread, tree, f"table {', '.join(unread)} is never read; read it with m.load, or drop it"
        )  # fmt: skip

    def _holds(self, holds: bool, node: ast.AST, sentence: str) -> bool:
        if not holds:
            self.broken.append(f"line {getattr(node, 'lineno', self._base) - self._base + 1}: {sentence}")
        return holds

    def _parameters(self, kind: Kind, arguments: ast.arguments) -> list[str]:
        names, wanted = [each.arg for each in arguments.args], PARAMETERS[kind]
        plain = not (
            arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.defaults
        )
        self._holds(
            plain and tuple(names[: len(wanted)]) == wanted, arguments,
            f"a {kind} takes ({', '.join(wanted)}), then its tables, all without defaults, got ({ast.unparse(arguments)})",
        )  # fmt: skip
        return names[len(wanted) :]

    def _expression(self, node: ast.expr) -> None:
        for instead, sentence in _INSTEAD.items():
            operator = getattr(node, "op", None)
            if isinstance(node, instead) or isinstance(operator, instead):
                self._holds(False, node, sentence)
                return
        if isinstance(node, ast.Name):
            self._name(node)
        elif isinstance(node, ast.Constant):
            self._holds(isinstance(node.value, bool | int | float), node, f"{node.value!r} is not a number")
        elif isinstance(node, ast.BinOp | ast.UnaryOp):
            self._operators(node, [node.op], [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand])
        elif isinstance(node, ast.Compare):
            self._holds(
                len(node.ops) == 1, node, "a chained comparison asks for one answer for all keys; use (a < b) & (b < c)"
            )
            self._operators(node, node.ops, [node.left, *node.comparators])
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute):
            self._function(node)
            self._holds(node.attr == "inf", node, f"{ast.unparse(node)} is a function; call it")
        else:
            self._holds(False, node, f"`{ast.unparse(node)}` cannot be inlined")

    def _operators(self, node: ast.expr, operators: list[Any], operands: list[ast.expr]) -> None:
        for operator in operators:
            self._holds(
                isinstance(operator, _SAFE_OPERATORS), node,
                f"{type(operator).__name__} does not mean the same everywhere; use arithmetic, comparisons, &, |, ^ or ~",
            )  # fmt: skip
        for operand in operands:
            self._expression(operand)

    def _name(self, node: ast.Name) -> None:
        if node.id in self.extra:
            self._holds(False, node, f"table {node.id} is read with m.load({node.id}, index, ...)")
            return
        if node.id in self._local:
            return
        if not self._holds(
            node.id not in self._own, node, f"{node.id} is used before it is assigned"
        ) or not self._holds(node.id in self._names, node, f"{node.id} is not known"):
            return
        value = self._names[node.id]
        if isinstance(value, bool | int | float):
            self.captured[node.id] = value
        elif isinstance(value, torch.Tensor):
            self._holds(
                False, node,
                f"{node.id} is a tensor; tensors come in as parameters behind kv_idx, given by .aux({node.id}=...)",
            )  # fmt: skip
        else:
            self._holds(
                False, node, f"{node.id} is a {type(value).__name__}; only numbers are captured, they become constants"
            )

    def _function(self, node: ast.Attribute) -> bool:
        """Is it `m.<a known name>`?"""
        root = node.value.id if isinstance(node.value, ast.Name) else None
        if not self._holds(
            root is not None and root not in self._own and self._names.get(root) is math, node,
            f"{ast.unparse(node)} is not known everywhere; use the functions of `from openmla.mods import m`",
        ):  # fmt: skip
            return False
        if self._holds(self.math_name in (None, root), node, "`m` goes by two names; use one"):
            self.math_name = root
        return self._holds(
            node.attr in math.NAMES, node, f"{ast.unparse(node)} does not exist; m has: {', '.join(math.NAMES)}"
        )

    def _call(self, node: ast.Call) -> None:
        if not self._holds(
            isinstance(node.func, ast.Attribute),
            node,
            f"`{ast.unparse(node.func)}` cannot be called; only functions of m",
        ):
            return
        assert isinstance(node.func, ast.Attribute)
        starred = any(isinstance(each, ast.Starred) for each in node.args)
        if not self._function(node.func) or not self._holds(
            not node.keywords and not starred, node, "arguments of m's functions are given by position"
        ):
            return
        arguments = list(node.args)
        if node.func.attr == "load":
            table = arguments.pop(0) if arguments else None
            name = table.id if isinstance(table, ast.Name) else ""
            if not self._holds(name in self.extra, node, "m.load reads a parameter behind kv_idx, its first argument"):
                return
            if self._holds(
                1 <= len(arguments) <= MAX_INDICES,
                node,
                f"m.load takes 1 to {MAX_INDICES} indices, got {len(arguments)}",
            ):
                self._holds(
                    self.tables.get(name, len(arguments)) == len(arguments), node,
                    f"table {name} is read with {self.tables.get(name)} and with {len(arguments)} indices",
                )  # fmt: skip
                self.tables[name] = len(arguments)
        elif node.func.attr != "inf":
            wanted = len(inspect.signature(getattr(math, node.func.attr)).parameters)
            self._holds(
                len(arguments) == wanted,
                node,
                f"{ast.unparse(node.func)} takes {wanted} arguments, got {len(arguments)}",
            )
        else:
            self._holds(False, node, "m.inf is a number, not a function")
        for argument in arguments:
            self._expression(argument)
