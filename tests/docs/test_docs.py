"""Links lead somewhere, the page that helps to choose knows every function, and docstrings every argument."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import aer_fast
from tests import ROOT

pytestmark = pytest.mark.host
PAGES = [
    page for folder in (".", "docs", "training", "bench") for page in sorted((ROOT / folder).glob("*.md"))
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code, where brackets and # are something else."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, no punctuation, hyphens for spaces, numbered again."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.is_file(), link  # the site has no folders
        assert to.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(to), link


def test_contributing_names_tests_that_there_are() -> None:
    """Files and functions; NAME stands for what is to be written."""
    files = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    there = {path.stem for path in files}
    for path in files:
        there |= set(re.findall(r"def (test_\w+)\(", path.read_text()))
    named = set(re.findall(r"\btest_\w+", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named - there == {"test_NAME"}


def test_the_page_that_helps_to_choose_knows_every_function() -> None:
    """As code, which the site makes a link to the reference."""
    named = set(re.findall(r"`(\w+)", (ROOT / "docs" / "choose.md").read_text()))
    missing = set(aer_fast.__all__) - {"reference"} - named
    assert not missing, f"docs/choose.md must say what {', '.join(sorted(missing))} is for"


def test_the_reference_is_built_from_every_public_module() -> None:
    """By mkdocstrings, which takes every public name of a module that a page asks for."""
    pages = [page.read_text() for page in (ROOT / "docs").glob("api*.md")]
    asked = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    paths = [
        path.relative_to(ROOT).with_suffix("") for path in (ROOT / "aer_fast/integrations").rglob("*.py")
    ]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    public = {name for name in modules - {"aer_fast.integrations"} if "._" not in name}
    assert sorted(asked) == sorted({"aer_fast", "aer_fast.reference"} | public)


Definition = ast.FunctionDef | ast.ClassDef


def definitions() -> Iterator[tuple[str, Definition]]:
    """Every function and class of the library, with its place: integrations.aer.Bookkeeping.save, say."""
    package = ROOT / "aer_fast"
    for path in [*package.glob("*.py"), *package.glob("_*/*.py"), *(package / "integrations").rglob("*.py")]:
        waiting: list[tuple[str, ast.AST]] = [
            (".".join(path.relative_to(package).with_suffix("").parts), ast.parse(path.read_text()))
        ]
        while waiting:
            place, parent = waiting.pop()
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, Definition):
                    yield f"{place}.{node.name}", node
                    waiting += [(f"{place}.{node.name}", node)] * isinstance(node, ast.ClassDef)


def parameters(node: Definition) -> list[str]:
    """Of a function; of a class those of its __init__ or, as of a named tuple, its fields."""
    if isinstance(node, ast.FunctionDef):
        a = node.args
        stars = [f"*{a.vararg.arg}"] if a.vararg else []
        pairs = [f"**{a.kwarg.arg}"] if a.kwarg else []
        named = [x.arg for x in a.posonlyargs + a.args if x.arg not in ("self", "cls")]
        return [*named, *stars, *(x.arg for x in a.kwonlyargs), *pairs]
    for inside in node.body:
        if isinstance(inside, ast.FunctionDef) and inside.name == "__init__":
            return parameters(inside)
    fields = [inside for inside in node.body if isinstance(inside, ast.AnnAssign)]
    return [ast.unparse(x.target) for x in fields if "ClassVar" not in ast.unparse(x.annotation)]


def described(node: Definition) -> list[str] | None:
    """What the docstring describes one by one; None where it does not begin to."""
    section = re.search(
        r"^(?:Args|Attributes):\n((?: {4}.*\n)+)", f"{ast.get_docstring(node)}\n", re.MULTILINE
    )
    return None if section is None else re.findall(r"^ {4}([*\w]+): ", section[1], re.MULTILINE)


def test_docstrings_describe_the_arguments_that_there_are() -> None:
    """All of them, each by itself, in their order: the site makes a table of them."""
    found = dict(definitions())
    assert {"_ppo_loss.ppo_loss", "integrations.aer.Bookkeeping.save"} <= found.keys()
    told = {place: names for place, node in found.items() if (names := described(node)) is not None}
    assert told == {place: parameters(found[place]) for place in told}


def is_public(place: str) -> bool:
    """Of `aer_fast`, with its methods, or of an integration."""
    if place.startswith("integrations."):
        return "._" not in place
    names = set(aer_fast.__all__) - {"reference"}  # which points to the functions that it specifies
    homes = {f"{getattr(aer_fast, name).__module__}.{name}".removeprefix("aer_fast.") for name in names}
    owner, _, name = place.rpartition(".")
    return place in homes or (owner in homes and name[0] != "_")


def test_docstrings_of_public_names_describe_arguments() -> None:
    public = {place: node for place, node in definitions() if is_public(place)}
    assert {"_ppo_loss.ppo_loss", "reference.PPOLoss", "_linear.plan.Plan.chunks"} <= public.keys()
    assert {"integrations.trl.main", "integrations.verl.kernel.KernelSwitch.undo"} <= public.keys()
    assert [place for place, node in public.items() if not ast.get_docstring(node)] == []
    assert [place for place, node in public.items() if parameters(node) and described(node) is None] == []
