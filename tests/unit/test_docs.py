"""The documentation is true where a program can tell: flags, names, paths, links, and every Python example runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sd_runtime import __version__, errors
from sd_runtime.fields import FIELDS
from sd_runtime.sampling.names import describe

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob(".github/**/*.md")])
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names files that are gone, too
COMMANDS = ("sd-run", "sd-export", "sd-export build", "sd-verify", "sd-bench")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
FILE = re.compile(r"(?<![\w/.-])((?:runtime|export|tests|scripts|docs|benchmarks)/[\w./*-]*)")
FAULT_TEST = re.compile(r"^def (test_fault_\d\d_\w+)", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def section(page: str, title: str) -> str:
    """What stands under `## title`, up to the next heading of that level."""
    match = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, f"no section {title}"
    return match[1]


def anchors(page: Path) -> set[str]:
    """The headings of a page as the ids that they become."""
    prose = CODE.sub("", text_of(page))
    titles = [re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).strip() for title in HEADING.findall(prose)]
    return {re.sub(r"[\s-]+", "-", title) for title in titles}


def parser_of(command: str) -> argparse.ArgumentParser:
    import sd_export.cli
    import sd_export.tensorrt_.cli
    import sd_export.verify.cli
    import sd_runtime.bench.cli
    import sd_runtime.cli.run

    builders: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "sd-run": sd_runtime.cli.run.build_parser,
        "sd-export": sd_export.cli.build_parser,
        "sd-export build": sd_export.tensorrt_.cli.build_parser,
        "sd-verify": sd_export.verify.cli.build_parser,
        "sd-bench": sd_runtime.bench.cli.build_parser,
    }
    return builders[command]()


def options_of(command: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(flag, its choices) of a command."""
    for action in parser_of(command)._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--help":
                yield flag, tuple(str(choice) for choice in action.choices or ())


# ---- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_says_first_what_was_not_measured() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) < 150
    assert any("GPU" in line for line in lines[:5])
    assert {"scripts/demo", "scripts/test"} <= {line.strip() for line in lines}  # what newcomers and CI run


# ---- commands and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_and_choice_is_on_the_page(command: str) -> None:
    page = CODE.sub("", section(text_of(DOCS / "command-line.md"), command))  # an example is no explanation
    flags = dict(options_of(command))
    assert set(flags) - set(FLAG.findall(page)) == set()
    choices = {choice for choices in flags.values() for choice in choices}
    assert {choice for choice in choices if not re.search(rf"\b{choice}\b", page)} == set()


@pytest.mark.parametrize("page", ["command-line", "prompts", "samplers", "gallery", "exactness", "python"])
def test_pages_name_no_flag_that_no_command_has(page: str) -> None:
    known = {flag for command in COMMANDS for flag, _ in options_of(command)} | {"--help"}
    assert set(FLAG.findall(text_of(DOCS / f"{page}.md"))) - known == set()


def test_every_field_of_a_request_is_on_the_page() -> None:
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text_of(DOCS / "python.md"), re.MULTILINE)))
    assert set(FIELDS) - set(named) == set()


def test_every_sampler_is_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (yes)? ?\|", text_of(DOCS / "samplers.md"), re.MULTILINE)
    expected = []
    for spelling, remark in describe():
        name, _, warps = spelling.partition("[")
        expected.append((name, remark.partition(":")[0], "yes" if warps else ""))
    assert [(name, label.strip(), warps) for name, label, warps in rows] == expected


def test_every_error_class_is_on_the_page() -> None:
    page = text_of(DOCS / "errors.md")
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.SDError):
            assert re.search(rf"^\| `{kind.__name__}` \|.*\| {kind.exit_code} \|", page, re.MULTILINE), kind


def test_every_extra_is_on_the_page() -> None:
    table = re.search(r"^\[project.optional-dependencies\]$(.*?)^\[", text_of(ROOT / "pyproject.toml"), re.M | re.S)
    assert table is not None
    page = text_of(DOCS / "install.md")
    for extra in re.findall(r"^([\w-]+) = \[", table[1], re.MULTILINE):
        assert re.search(rf"\[(?:[\w-]+,)*{extra}(?:,[\w-]+)*\]", page), extra


def test_faults_name_the_tests_that_there_are() -> None:
    page = text_of(DOCS / "faults.md")
    sources = "".join(text_of(path) for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named - defined == set()
    assert set(FAULT_TEST.findall(sources)) - named == set()
    for number, *_, test, holds in re.findall(r"^\| (\d+) \|(.*?)\|(.*?)\|(.*?)\| (.+?) \|$", page, re.MULTILINE):
        assert (holds == "not yet") == (test.strip() == ""), f"fault {number}"


def test_the_changelog_has_this_version() -> None:
    headings = HEADING.findall(text_of(ROOT / "CHANGELOG.md"))
    assert "Unreleased" in headings
    assert ".dev" in __version__ or any(heading.startswith(__version__) for heading in headings)


# ---- links and paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_pictures_exist(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_paths_exist(page: Path) -> None:
    """Of files in this repository; what holds < or $ stands for several."""
    for path in FILE.findall(text_of(page)):
        name = path.rstrip(".")
        if not re.search(rf"{re.escape(path)}[<$]", text_of(page)):
            assert any(ROOT.glob(name)), name


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w-]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_picture_is_shown() -> None:
    shown = {link.rsplit("/", 1)[-1] for page in PAGES for link in LINK.findall(text_of(page))}
    assert {picture.name for picture in (DOCS / "pictures").iterdir()} - shown == set()


# ---- examples --------------------------------------------------------------------------------------------------------


RUNNABLE = [README, DOCS / "python.md", DOCS / "serving.md"]


@pytest.mark.parametrize("page", RUNNABLE, ids=names(RUNNABLE))
def test_python_examples_run(page: Path, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles/demo").symlink_to(demo_bundle.resolve())
    monkeypatch.setenv("SD_LEAN_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    blocks = [code for language, code in CODE.findall(text_of(page)) if language == "python"]
    assert blocks
    meaning: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, str(page), "exec"), meaning)
