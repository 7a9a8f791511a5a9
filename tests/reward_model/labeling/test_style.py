"""What the pages are made of: contrast of the colours, nothing inline, nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import reward_model.labeling

FOLDER = Path(reward_model.labeling.__file__).parent
CSS = (FOLDER / "static" / "style.css").read_text(encoding="utf-8")
FRAME = "base.html.j2"
PAGES = [path for path in (FOLDER / "templates").iterdir() if path.name == FRAME or FRAME in path.read_text("utf-8")]
TEXT = [
    ("ink", "ground"),
    ("ink", "sheet"),
    ("ink", "raised"),
    ("soft", "ground"),
    ("soft", "sheet"),
    ("soft", "raised"),
]
TEXT += [("a", "sheet"), ("a", "ground"), ("b", "sheet"), ("ink", "a-mark"), ("ink", "b-mark"), ("ink", "a-tint")]
TEXT += [("ink", "b-tint"), ("on-action", "action"), ("ink", "warn-tint"), ("ink", "bad-tint"), ("bad", "sheet")]
TEXT += [("bad", "bad-tint")]
SHAPES = [
    ("edge", "sheet"),
    ("edge", "ground"),
    ("focus", "sheet"),
    ("focus", "ground"),
    ("a", "raised"),
    ("b", "raised"),
]


def palette(scheme: str) -> dict[str, str]:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    return colours | (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark)) if scheme == "dark" else {})


def luminance(colour: str) -> float:
    """Relative luminance of sRGB; WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """1 (the same) to 21 (black on white); WCAG 2.2."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_contrast_of_known_colours() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the lightest grey that passes AA on white


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_pass_wcag_aa(scheme: str) -> None:
    colours = palette(scheme)
    low = [pair for pair in TEXT if contrast(colours[pair[0]], colours[pair[1]]) < 4.5]
    low += [pair for pair in SHAPES if contrast(colours[pair[0]], colours[pair[1]]) < 3]
    assert not low


def test_dark_replaces_every_colour() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[:2]
    names = [re.findall(r"--([\w-]+): #", part) for part in (light, dark)]
    assert names[0] == names[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_templates_hold_nothing_that_the_csp_forbids(path: Path) -> None:
    text = re.sub(r"\{%.*?%\}|\{\{.*?\}\}", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", text)


@pytest.mark.parametrize("path", sorted((FOLDER / "static").iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    """The pages work where there is no internet."""
    addresses = re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+", path.read_text(encoding="utf-8"))
    assert set(addresses) <= {"http://www.w3.org"}  # SVG's name of itself
