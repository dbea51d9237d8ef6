"""What surrounds the code: one version, a citation, the forms and workflows of the project."""

import re
from pathlib import Path
from typing import Any

import pytest

import aer_fast
from tests import ROOT

pytestmark = pytest.mark.host
GITHUB = ROOT / ".github"
FORMS = sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml"))
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))


def read(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text())


def test_the_version_stands_once() -> None:
    package = ROOT / "aer_fast" / "__init__.py"
    assert f'__version__ = "{aer_fast.__version__}"\n' in package.read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", aer_fast.__version__)
    others = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *ROOT.glob("aer_fast/**/*.py")]
    assert [path for path in others if aer_fast.__version__ in path.read_text()] == [package]


def test_the_changelog_ends_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in (aer_fast.__version__, "Unreleased")
    sections = re.findall(r"^### (\w+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_format_asks_for() -> None:
    """The required fields of the Citation File Format 1.2.0, and the project's own words."""
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'description = "{citation["abstract"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert f'authors = [{{ name = "{citation["authors"][0]["name"]}" }}]' in project
    (paper,) = citation["references"]
    for work in (citation, paper):
        assert isinstance(work["title"], str)
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"given-names", "family-names"})
    assert {"message", "type"} <= citation.keys()
    number = paper["url"].removeprefix("https://arxiv.org/abs/")
    assert number in (ROOT / "README.md").read_text()
    assert paper["identifiers"][0]["value"] == f"arXiv:{number}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_for_issues_has_what_github_asks_for(path: Path) -> None:
    form = read(path)
    if path.name == "config.yml":
        assert form.keys() <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    for part in form["body"]:
        assert part["type"] in {"textarea", "input", "dropdown"}
        assert part["attributes"]["label"]
        assert (part["type"] == "dropdown") == ("options" in part["attributes"])


def test_a_bug_report_asks_for_what_a_bug_needs() -> None:
    text = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    for needed in ("torch.utils.collect_env", "aer_fast.__version__", "smallest program", "impl"):
        assert needed in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_there_is(path: Path) -> None:
    text = path.read_text()
    for job in read(path)["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"run: make ([a-z-]+)", text):
        assert target in targets or target.removesuffix("-") == "test"
    for script in re.findall(r"\.ci/[\w.]+", text):
        assert (ROOT / script).is_file()
