"""The docs name only what exists: files, config keys, verbs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from teratron.cli.main import VERBS
from teratron.config import Config, key_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "|".join({name.partition(".")[0] for name in key_names()})
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def links(text: str) -> Iterator[str]:
    """The targets of links and images, without those of the web."""
    for target in re.findall(r"\]\(<?([^)\s>]+)", FENCED.sub("", text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def keys(text: str) -> Iterator[str]:
    """Config keys on a command line, and those in backticks; `*` stands for the rest of a name."""
    yield from (name for name in re.findall(r"--(?:no-)?([a-z]+\.[a-z0-9_*-]+)", text) if name != "section.key")
    yield from re.findall(rf"`((?:{SECTIONS})\.[a-z0-9_*]+)(?: = [^`]*)?`", text)


def verbs(text: str) -> Iterator[str]:
    """What follows `teratron` at the start of a line of code or of a piece in backticks."""
    code = [line for block in FENCED.findall(text) for line in block.splitlines()]
    for piece in code + re.findall(r"`([^`\n]+)`", FENCED.sub("", text)):
        yield from re.findall(r"^\s*(?:\S*/)?teratron ([a-z]\S*)", piece)


def broken(path: Path, text: str) -> Iterator[str]:
    """Links of a page that lead nowhere."""
    for link in links(text):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def anchors(path: Path) -> set[str]:
    """What a link may name after `#`: a page's headings, as they are turned into anchors."""
    headings = re.findall(r"^#+ (.*)", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def unknown_keys(text: str) -> list[str]:
    return [name for name in keys(text) if not any(fnmatchcase(key, name.replace("-", "_")) for key in key_names())]


@page
def test_links_and_images_are_there(path: Path) -> None:
    assert list(broken(path, path.read_text("utf-8"))) == []


@page
def test_pages_name_no_place_outside_of_the_checkout(path: Path) -> None:
    """Commands are typed in the checkout; links are checked above."""
    assert not re.search(r"(?<![\w.])\.\./", re.sub(r"\]\([^)]*\)", "", path.read_text("utf-8")))


@page
def test_keys_exist(path: Path) -> None:
    assert unknown_keys(path.read_text("utf-8")) == []


@page
def test_verbs_exist(path: Path) -> None:
    assert set(verbs(path.read_text("utf-8"))) <= set(VERBS)


def test_the_pages_name_keys_links_and_verbs() -> None:
    """Or the tests above would hold for a pattern that finds nothing."""
    text = "\n".join(path.read_text("utf-8") for path in PAGES)
    assert len(set(keys(text))) > 20
    assert len(set(links(text))) > 8
    assert {"demo", "train", "generate", "data"} <= set(verbs(text))


@pytest.mark.parametrize(
    "text",
    [
        "see [data](datas.md)",
        "![the loss](images/none.png)",
        "[below](#no-such-heading)",
        "[a key](README.md#no-such-heading)",
    ],
)
def test_a_planted_broken_link_is_found(text: str) -> None:
    assert len(list(broken(ROOT / "README.md", text))) == 1


@pytest.mark.parametrize(
    "text", ["`--train.stepz 3`", "teratron train --optim.learning-rate 1", "`model.layer` = 12", "`trains.*`, `log.x*`"]
)
def test_a_planted_key_is_found(text: str) -> None:
    assert len(unknown_keys(text)) == 1


@pytest.mark.parametrize("text", ["```\nteratron trian --run x\n```", "`teratron serv`", "```\n.venv/bin/teratron dem\n```"])
def test_a_planted_verb_is_found(text: str) -> None:
    assert set(verbs(text)) - set(VERBS)


@page
def test_presets_exist(path: Path) -> None:
    for name in re.findall(r"^teratron train ([a-z][\w.-]+)", path.read_text("utf-8"), re.MULTILINE):
        Config.preset(name)
