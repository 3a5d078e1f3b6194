"""CPython's own documentation, as it ships inside every Python. Nothing is imported: sources are parsed."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from modelyard.data.config import PyDocs
from modelyard.data.sources import Part, plan, read
from modelyard.errors import DataError

_TOPICS = "pydoc_data/topics.py"
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib-dynload",
    "turtledemo",
}


@plan.register
def plan_pydocs(source: PyDocs) -> list[Part]:
    """One part per file, named relative to the library's folder, the topics first."""
    library = _library()
    if not (library / _TOPICS).is_file():
        raise DataError(f"this Python has no {_TOPICS} in {library}", "use a Python with its documentation topics")
    names = sorted(_sources(library)) if source.docstrings else []
    return [Part(_TOPICS), *(Part(name) for name in names)]


@read.register
def read_pydocs(source: PyDocs, part: Part) -> Iterator[str | None]:
    """The topics, or the docstrings of one module: each a document headed by what it documents."""
    path = _library() / part.uri
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # the library holds a few files that are broken on purpose
        return
    if part.uri == _TOPICS:
        yield from _topics(tree)
    else:
        module = part.uri.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield from _docstrings(tree, module, module)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _sources(library: Path) -> Iterator[str]:
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not _SKIPPED & set(name.parts) and name.as_posix() != _TOPICS:
            yield name.as_posix()


def _topics(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (str(text) for text in ast.literal_eval(node.value).values())


def _docstrings(node: ast.AST, name: str, heading: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=True)
        if text:
            yield f"{heading}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}", f"class {name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{child.name}"
            yield from _docstrings(child, inner, f"{inner}({ast.unparse(child.args)})")
