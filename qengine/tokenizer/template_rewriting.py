"""Writes the counting into a template's syntax tree.

What the sandbox's hooks do not see passes through filters of the environment whose names no template can write: loops
and macros, `~`, slices, comparisons, keys that are looked up, literals of lists and dicts, the text of blocks, and
arguments given with `*` and `**`. A name that is a value, as in `map(name)`, is for the environment to refuse.
"""

from __future__ import annotations

from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

#: Names of the environment's own filters: with a space, so that they are none in a template.
ARGUMENTS, CONCATENATED, MADE, STEP, TESTED = ("the arguments", "a concatenation", "what is made", "a step", "a test")
SEARCHED, TIMED = "what is searched", "what takes time"
_SEARCHES = ("in", "notin")
#: A piece of text that stands in the template: what one character may take, and the piece's place in a list.
_CHAR_BYTES, _PLACE_BYTES = 4, 8


class Counting(NodeTransformer):
    """Changes the tree in place."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (as Jinja calls it)
        stepping = self._with_step(node)
        if node.test is not None:
            node.test = _filtered(cast(nodes.Expr, node.test), TESTED)
        return stepping

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), CONCATENATED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """A key of the template's own takes no time to hash; a tuple that was made may."""
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, MADE)
        return node if isinstance(node.arg, nodes.Const) else _filtered(node, TIMED)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """One with a constant takes no longer than the constant is; any other as long as its operands are."""
        self.generic_visit(node)
        for operand in node.ops:
            if operand.op in _SEARCHES and not _is_constant(operand.expr):
                operand.expr = _filtered(operand.expr, SEARCHED)
        return node if _is_short(node) else _filtered(node, TIMED)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._container(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._container(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._container(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _from_block(node.filter, node.lineno)
        return node

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _from_block(node.filter, node.lineno)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        return self._with_checked_arguments(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        return self._with_checked_arguments(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return self._with_checked_arguments(node)

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:  # noqa: N802
        raise SecurityError("autoescape is not for chat templates")

    def _container(self, node: nodes.Expr) -> nodes.Node:
        if _is_constant(node):
            return node
        self.generic_visit(node)
        return _filtered(node, MADE)

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Each time it runs, count one step and the text that is written as it stands."""
        self.generic_visit(node)
        texts = node.find_all(nodes.TemplateData)
        num_bytes = sum(_CHAR_BYTES * len(text.data) + _PLACE_BYTES for text in texts)
        step = _filtered(nodes.Const(num_bytes, lineno=node.lineno), STEP)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def _with_checked_arguments(self, node: Any) -> nodes.Node:
        """Unpacking `*text` would make a text of each character before any hook is asked."""
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            given = getattr(node, name)
            if given is not None:
                setattr(node, name, _filtered(given, ARGUMENTS))
        checked: nodes.Node = node
        return checked


def _filtered(node: nodes.Expr | None, name: str, lineno: int | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno if node is None else node.lineno)


def _is_constant(node: nodes.Node) -> bool:
    constant = (nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair)
    return isinstance(node, constant) and all(isinstance(inner, constant) for inner in node.find_all(nodes.Node))


def _is_short(node: nodes.Compare) -> bool:
    """Whether it compares with a constant, or searches what counts by itself."""
    if len(node.ops) > 1:
        return False
    [operand] = node.ops
    if operand.op in _SEARCHES:
        return not isinstance(operand.expr, nodes.Dict)  # A dict takes the hash of what it is asked for.
    return _is_constant(node.expr) or _is_constant(operand.expr)


def _from_block(found: nodes.Filter | None, lineno: int) -> nodes.Filter:
    """The filters of a block, with its text counted before the first of them."""
    text = _filtered(None, MADE, lineno)
    if found is None:
        return text
    first = found
    while isinstance(first.node, nodes.Filter):
        first = first.node
    first.node = text
    return found
