"""The small language of ``--task`` and ``--model``: names with settings, added up with weights.

chain_sum(max_terms=2) * 3 + leg_counting
"""

import ast
from typing import Any, NamedTuple


class Call(NamedTuple):
    """One name with its settings."""

    text: str
    name: str
    settings: dict[str, Any]
    weight: float


def parse(text: str) -> list[Call]:
    """The summands of a sum of calls. Raises ValueError that shows what was meant to be one."""
    try:
        return _terms(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        form = "name(setting=value) * weight + ..."
        raise ValueError(f"{text!r} is not of the form {form}: {reason}") from None


def _terms(node: ast.expr) -> list[Call]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left) + _terms(node.right)
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, node = (
            (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
        )
        weight = float(ast.literal_eval(number))
        if not 0 < weight < float("inf"):
            raise ValueError(f"a weight must be positive, got {weight}")
    if isinstance(node, ast.Name):
        return [Call(node.id, node.id, {}, weight)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        settings = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        return [Call(ast.unparse(node), node.func.id, settings, weight)]
    raise ValueError(f"{ast.unparse(node)!r} is no name with settings")
