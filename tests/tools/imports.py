"""Which file imports which, read from the source: what stands in a function or is there for types alone counts too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FOLDERS = ("kernels", "data", "optim", "train", "launch")


def sources(root):
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def imports(path):
    """(line, module) of a file; a name that is taken from a module is listed below it, for it may be one as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module(path):
    return ".".join(["thriftlab", *path.with_suffix("").parts]).removesuffix(".__init__")


def imports_between(root):
    """{(file, file that it imports): the line that says so}.

    Python also runs the __init__ of the packages around a module; these are no imports of the file's own.
    """
    files = {module(path.relative_to(root)): path.relative_to(root) for path in sources(root)}
    found = {}
    for path in files.values():
        lines = (root / path).read_text().splitlines()
        for line, name in imports(root / path):
            if files.get(name, path) != path:
                found.setdefault((path, files[name]), f"{path}:{line}: {lines[line - 1].strip()}")
    return found


def within(folder, edges):
    """The same between what lies in a folder, each sub-folder taken as one; the folder's own __init__ is left out."""
    found = {}
    for (importer, imported), line in edges.items():
        if folder in importer.parents and folder in imported.parents:
            one, other = (folder / path.relative_to(folder).parts[0] for path in (importer, imported))
            if one != other and folder / "__init__.py" not in (one, other):
                found.setdefault((one, other), line)
    return found


def circle(edges):
    """None, or a circle in words: who imports whom, and the lines that do."""
    graph: dict[Path, list[Path]] = {}
    for importer, imported in edges:
        graph.setdefault(importer, []).append(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        path = error.args[1][::-1]
        lines = (edges[pair] for pair in zip(path, path[1:], strict=False))
        return "\n  ".join([" -> ".join(map(str, path)), *lines])
