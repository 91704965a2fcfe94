"""Habits as limits: what a reader may rely on, checked over the tree. Allow-lists below may only shrink."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import openmla

ROOT = Path(__file__).resolve().parents[2]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_LINES, MAX_KERNEL_LINES = 600, 1500
MAX_FUNCTION_LINES = 80
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
PUBLIC = [
    "Fault", "KVLayout", "PagedKVCache", "Target", "append", "check_errors", "decode", "decode_shared_prefix", "explain", "flash_mla",
    "kv_layout", "plan", "prefill", "sparse_decode", "sparse_prefill", "workspace_bytes",
]  # fmt: skip

# path -> why it may
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
CATCH_ALL = {
    "src/openmla/backends/torch/workers.py": "what a thread raises is raised again in the caller",
    "src/openmla/ops/observers.py": "a callback that watches calls must not break them",
    "src/openmla/observe/doctor.py": "one broken probe must not hide the others",
}
DEVICE_CODE = (
    "kernel.py",
    "backends/cute/combine.py",
    "backends/cute/schedule.py",
    "decode_dense/merge.py",
    "decode_dense_small/merge.py",
    "decode_dense_small/loads.py",
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def trees(paths: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in paths:
        yield name(path), ast.parse(path.read_text(encoding="utf-8"))


def is_device_code(path: str) -> bool:
    return any(part in path for part in DEVICE_CODE)


def test_files_are_short():
    found = {}
    for path in [*SOURCE, *TESTS]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_KERNEL_LINES if path.name == "kernel.py" else MAX_LINES
        if lines > limit and name(path) not in LONG_FILES:
            found[name(path)] = lines
    assert not found, f"over the limit of lines: {found}; split by meaning"


def test_functions_are_short():
    found = {}
    for path, tree in trees(SOURCE):
        if is_device_code(path):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                begin, end = _body(node)
                if end - begin + 1 > MAX_FUNCTION_LINES and f"{path}:{node.name}" not in LONG_FUNCTIONS:
                    found[f"{path}:{node.name}"] = end - begin + 1
    assert not found, f"over {MAX_FUNCTION_LINES} lines without docstring: {found}"


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Lines of the statements; signature and docstring are documentation, and may be as long as they need."""
    has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
    first = node.body[1] if has_docstring else node.body[0]
    return first.lineno, node.end_lineno or first.lineno


def test_files_have_a_name():
    vague = [name(path) for path in [*SOURCE, *TESTS] if VAGUE & {path.stem, *path.parent.parts}]
    assert not vague, f"a file that cannot be named has not been understood: {vague}"


def test_imports_do_not_go_round():
    """No module needs, at any depth, one that needs it; an import inside a function, or for a type alone, counts too."""
    modules = {_dotted(path): path for path in SOURCE}
    needs = {module: set(_imports(path)) & modules.keys() - {module} for module, path in modules.items()}
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names the circle


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> Iterator[str]:
    """What a file's import statements name. `from a import b` is the module a.b, or the module a where b is none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = ROOT / "src" / node.module.replace(".", "/")
            for alias in node.names:
                is_module = (inside / alias.name).is_dir() or (inside / f"{alias.name}.py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_environment_is_read_in_one_place():
    found = []
    for path, tree in trees(SOURCE):
        for node in ast.walk(tree):
            by_attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            by_import = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and {alias.name for alias in node.names} & {"environ", "getenv"}
            )
            if (by_attribute or by_import) and path != "src/openmla/core/env.py":
                found.append(f"{path}:{node.lineno}")
    assert not found, f"environment variables belong into core/env.py: {found}"


def test_every_environment_variable_is_listed():
    from openmla.core import env

    assert all(variable.name.startswith("OPENMLA_") and variable.doc for variable in env.ALL)
    assert len(env.ALL) <= 8
    assert len({variable.name for variable in env.ALL}) == len(env.ALL)
    defined = {value for value in vars(env).values() if isinstance(value, env.Variable)}
    assert defined == set(env.ALL)


def test_nobody_swallows_everything():
    found = []
    for path, tree in trees(SOURCE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and path not in CATCH_ALL:
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                names = {getattr(each, "id", None) for each in caught}
                passes_on = isinstance(node.body[-1], ast.Raise)
                if (node.type is None or names & {"Exception", "BaseException"}) and not passes_on:
                    found.append(f"{path}:{node.lineno}")
    assert not found, f"`except Exception` hides bugs: {found}"


def test_catch_alls_are_few():
    """The files of the list may; each at most once, so that a second one is a decision."""
    for path in filter(lambda path: (ROOT / path).exists(), CATCH_ALL):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
        assert sum(getattr(node.type, "id", "") in ("Exception", "BaseException") for node in handlers) <= 1, path


def test_no_code_from_data():
    found = []
    # cute.compile and torch.compile are attributes, and meant; the builtin is a name.
    banned_modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path, tree in trees(SOURCE):
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import) and banned_modules & {a.name.split(".")[0] for a in node.names}:
                found.append(f"{where} import")
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in banned_modules:
                found.append(f"{where} import")
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__"):
                found.append(f"{where} {node.func.id}()")
            if ast.unparse(node.func) in ("os.system", "os.popen"):
                found.append(f"{where} {ast.unparse(node.func)}()")
            if any(key.arg == "shell" and getattr(key.value, "value", None) is True for key in node.keywords):
                found.append(f"{where} shell=True")
            if ast.unparse(node.func) == "torch.load":
                found.append(f"{where} torch.load (pickle)")
    assert not found, found


def test_public_names():
    assert sorted(openmla.__all__) == PUBLIC
    assert len(PUBLIC) <= 20
    assert set(PUBLIC) <= set(dir(openmla))


@pytest.mark.parametrize("public", PUBLIC)
def test_public_name_is_there_and_documented(public):
    assert getattr(openmla, public).__doc__


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"has no attribute 'decodee'; it has: .*decode"):
        openmla.decodee  # noqa: B018


def test_skips_have_reasons():
    found = []
    for path, tree in trees(TESTS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail"):
                call = next(
                    (c for c in ast.walk(tree) if isinstance(c, ast.Call) and c.func is node),
                    None,
                )
                words = [*call.args, *(key.value for key in call.keywords)] if call else []
                if not any(_is_text(word) for word in words):
                    found.append(f"{path}:{node.lineno}")
    assert not found, f"skipped without a reason: {found}"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(node.value)
    )


def test_every_module_says_what_it_is():
    silent = [path for path, tree in trees(SOURCE) if ast.get_docstring(tree) is None]
    assert not silent, f"without a module docstring: {silent}"
