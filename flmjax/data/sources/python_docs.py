"""English text of every Python interpreter: topics of the language reference and docstrings of the library."""

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    | {"encodings", "pydoc_data"}  # data, slow to parse
)
MIN_CHARACTERS = 100  # of a document; a shorter one holds little more than a name

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[str]:
    """About 2 MB of English prose and reference text (PSF licence), no text repeated exactly.

    The topics of `pydoc_data` (the language reference) come first, then the standard library, file by file in sorted
    order: one document with the docstrings of a module and its functions, and one for each class with the docstrings of
    its methods. The name and the arguments of a function stand above its docstring. The files are parsed, never
    imported. The text depends on the interpreter's version alone (3.11.7: 0.5 MB of topics, 1.8 MB of docstrings).
    """
    seen: set[str] = set()
    for name in sorted(topics.topics):
        yield from _new(topics.topics[name].strip("\n"), seen)
    root = Path(sysconfig.get_path("stdlib"))
    for path in _sources(root):
        for document in _module_documents(path, ".".join(_module_name(path.relative_to(root))), seen):
            yield from _new(document, seen)


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _new(document: str, seen: set[str]) -> Iterator[str]:
    if len(document) >= MIN_CHARACTERS and document not in seen:
        seen.add(document)
        yield document


def _module_name(path: Path) -> tuple[str, ...]:
    return path.parts[:-1] if path.name == "__init__.py" and path.parts[:-1] else path.with_suffix("").parts


def _module_documents(path: Path, name: str, seen: set[str]) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in strings of the library
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # bad-syntax fixtures; null bytes
        return
    definitions = [node for node in tree.body if isinstance(node, _Definition)]
    sections = _sections(tree, f"module {name}", seen)
    for node in definitions:
        if not isinstance(node, ast.ClassDef):
            sections += _sections(node, _heading(node), seen)
    yield "\n\n".join(sections)
    for node in definitions:
        if isinstance(node, ast.ClassDef):
            sections = _sections(node, _heading(node), seen)
            for method in node.body:
                if isinstance(method, _Definition):
                    sections += _sections(method, f"{node.name}.{_heading(method)}", seen)
            yield "\n\n".join(sections)


def _heading(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def _sections(node: _Definition | ast.Module, heading: str, seen: set[str]) -> list[str]:
    docstring = ast.get_docstring(node)
    if not docstring or docstring in seen or not _is_text(docstring):
        return []
    seen.add(docstring)
    return [f"{heading}\n\n{docstring}"]


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate written as an escape
        return False
    return True
