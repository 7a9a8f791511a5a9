"""What all HTML pages have in common: templates that escape, and texts that no page can hold made harmless."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

# C0 and C1 controls but tab and newline, bidirectional overrides, lone surrogates (UTF-8 cannot hold them).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def page_environment(templates: Path) -> Environment:
    """Everything that is filled into a page is escaped; a name that a page wants and does not get is an error."""
    loader = FileSystemLoader(templates)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def clean(text: Any) -> str:
    """The text with U+FFFD for characters that no page can hold or that would reorder their surroundings."""
    return _UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def inline_code(text: Any) -> Markup:
    """Escaped text whose `` `backticks` `` are shown as code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))
