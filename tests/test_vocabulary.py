"""Identifiers in kd/ and hydra_plugins/ are standard terms.

A loss is few calls from the command.
"""

import ast
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SMALL

import kd as package
from kd.methods.logits import Logits

ROOT = Path(package.__file__).parents[1]
SOURCES = sorted(path for name in ("kd", "hydra_plugins") for path in (ROOT / name).rglob("*.py"))
PRIVATE = {
    "found",
    "said",
    "asked",
    "kept",
    "held",
    "place",
    "places",
    "aside",
    "tell",
    "told",
    "anew",
    "begun",
    "began",
    "spent",
    "tutor",
    "heard",
    "heed",
    "alone",
    "together",
    "beside",
    "strangers",
    "was",
    "words",
    "born",
    "whole",
    "wanted",
    "what",
    "why",
    "same",
}


def bound(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (identifier, line) of everything that a module binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_identifiers_are_standard_terms(path: Path) -> None:
    names = [(name, line) for name, line in bound(ast.parse(path.read_text())) if name in PRIVATE]
    assert names == []


def test_the_private_words_are_found_wherever_they_are_bound() -> None:
    code = """
class born: pass
def tell(asked, *, kept=1):
    self.held, (found, _) = 1, (2, 3)
    for said in asked: pass
    with a as place: pass
    try: pass
    except E as why: pass
    return [beside for beside in x]
"""
    names = {name for name, _ in bound(ast.parse(code))} & PRIVATE
    assert names == {
        "born",
        "tell",
        "asked",
        "kept",
        "held",
        "found",
        "said",
        "place",
        "why",
        "beside",
    }


def test_a_loss_is_few_calls_from_the_command(
    kd: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m kd` adds one frame, that of kd/__main__.py: 6 are allowed above the method."""
    frames: list[str] = []
    forward = Logits.forward

    def traced(self: Logits, *args: object) -> object:
        own = Path(package.__file__).parent
        frames[:] = [f.name for f in traceback.extract_stack() if own in Path(f.filename).parents]
        return forward(self, *args)

    monkeypatch.setattr(Logits, "forward", traced)
    assert kd(*SMALL, "method=logits", "threads=1", "tracker.mode=disabled").code == 0
    assert frames == ["main", "task", "execute", "steps", "train"]
