"""What a chat template reads, from its syntax tree: its options, and whether it wants content in parts.

Invariant: each question takes time in proportion to the tree.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import meta, nodes


def count_nodes(tree: nodes.Node) -> int:
    """Nodes of the tree, however deep it is."""
    count, found = 0, [tree]
    while found:
        node = found.pop()
        count += 1
        found.extend(node.iter_child_nodes())
    return count


def depth_of(tree: nodes.Node) -> int:
    """Nodes on the longest way down from the root, itself included."""
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in node.iter_child_nodes()]
    return depth


def options_of(tree: nodes.Template) -> frozenset[str]:
    """Names that the template asks for: those it sets itself only if it sets them in case nobody gave them.

    Raises:
        TemplateError: if it cannot be compiled.
    """
    own = {name for name, _ in _assignments(tree)} - _names_with_default(tree)
    return frozenset(meta.find_undeclared_variables(tree)) - own


def reads(tree: nodes.Template, variable: str) -> bool:
    """Whether the template reads the variable."""
    return any(name.name == variable and name.ctx == "load" for name in tree.find_all(nodes.Name))


def loops_over_content(tree: nodes.Template) -> bool:
    """Whether a {% for %} runs over a message's content: itself, a variable set to it, or a macro's argument."""
    names = _names_of_content(tree)
    return any(_is_content(_unfiltered(loop.iter), names) for loop in tree.find_all(nodes.For))


def _names_of_content(tree: nodes.Template) -> set[str]:
    """Names that are set to a message's content, or to another such name."""
    copies: dict[str, list[str]] = {}
    found: list[str] = []
    for name, value in _bindings(tree):
        source = _unfiltered(value)
        if isinstance(source, nodes.Name):
            copies.setdefault(source.name, []).append(name)
        elif _is_content(source, set()):
            found.append(name)
    names: set[str] = set()
    while found:
        name = found.pop()
        if name not in names:
            names.add(name)
            found.extend(copies.get(name, ()))
    return names


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """(name, value) of every {% set name = value %} and every macro argument given by position."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    yield from _assignments(tree)
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            yield from zip((argument.name for argument in macro.args), call.args, strict=False)


def _assignments(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node


def _names_with_default(tree: nodes.Template) -> set[str]:
    """Names that the template asks about: `is defined`, `is undefined`, `| default(...)`."""
    asked = [node.node for node in tree.find_all(nodes.Test) if node.name in ("defined", "undefined")]
    asked += [node.node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d") and node.node]
    return {node.name for node in asked if isinstance(node, nodes.Name)}


def _unfiltered(node: nodes.Node) -> nodes.Node:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return node


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names
