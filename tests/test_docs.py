"""Links in the project's pages lead somewhere, and the page that helps to choose knows every function."""

import re
from pathlib import Path

import pytest

import aer_fast

ROOT = Path(__file__).parent.parent
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
        assert to.exists(), link
        assert to.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(to), link


def test_the_page_that_helps_to_choose_knows_every_function() -> None:
    named = set(re.findall(r"`(\w+)", (ROOT / "docs" / "choose.md").read_text()))
    results = {"TokenStats", "PPOLoss", "DistillLoss", "reference"}
    assert set(aer_fast.__all__) - results <= named


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"^## `(\w+)`\n\n::: aer_fast\.\1$", page, re.MULTILINE))
    assert shown == set(aer_fast.__all__) - {"reference"}
