"""What the labeling page shows: model output as safe HTML, and a task as JSON.

Model output is hostile. Markdown is read with HTML switched off, and its HTML passes an allow-list that holds no
image, style, class, id or script, and links to http, https and mailto only. The page's CSP is a second wall, not the
first. A policy's name never comes through here: a task is blind.
"""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML

if TYPE_CHECKING:
    from reward_model.labeling.store import Task
    from rlhf.types import Message, Prompt

MAX_MARKDOWN = 30_000
"""Characters; a longer text is shown as it is. Bounds the time of pathological Markdown to about half a second."""

MAX_TABLE_CELLS = 5_000
"""Cells that a text's tables could have at most: a row of few characters is filled up to the width of its table."""

TAGS = {"p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li", "strong", "em", "s"}
TAGS |= {"code", "pre", "a", "table", "thead", "tbody", "tr", "th", "td"}
CLEANER = nh3.Cleaner(
    tags=TAGS,
    attributes={"*": set(), "a": {"href"}, "ol": {"start"}},
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)


class TextRenderer(RendererHTML):
    """Shows an image as its description: a page that fetched images would tell others what is being labeled."""

    def image(self, tokens: Any, idx: int, options: Any, env: Any) -> str:
        """`[image: description]`, as text."""
        return f"[image: {html.escape(self.renderInlineAsText(tokens[idx].children, options, env))}]"


def markdown_parser(*, tables: bool) -> MarkdownIt:
    """CommonMark without HTML, with bare links, strikethrough, line breaks as they were typed, and tables or none."""
    options = {"html": False, "linkify": True, "breaks": True, "xhtmlOut": False}
    parser = MarkdownIt("commonmark", options, renderer_cls=TextRenderer).enable(["linkify", "strikethrough"])
    return parser.enable("table") if tables else parser


PARSERS = {tables: markdown_parser(tables=tables) for tables in (False, True)}


class RenderedTexts:
    """HTML by its Markdown. Of the texts and their HTML `limit` characters are kept at most, those used last.

    A character takes 1 to 4 bytes, so that the default keeps 64 MB at the worst: of the longest texts read as Markdown
    some 200, of ordinary responses several thousand. Thread-safe.
    """

    def __init__(self, limit: int = 16_000_000) -> None:
        self.limit = limit
        self.characters = 0
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, text: str) -> str:
        """`text` as HTML, rendered where it is not kept."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        rendered = render(text)  # without the lock: others' texts do not wait
        with self._lock:
            if text not in self._kept and len(text) + len(rendered) <= self.limit:
                self._kept[text] = rendered
                self.characters += len(text) + len(rendered)
            while self.characters > self.limit:
                old, its_html = self._kept.popitem(last=False)
                self.characters -= len(old) + len(its_html)
        return rendered


markdown_html = RenderedTexts()
"""`render`, without doing the same twice: an item is served to several annotators, and comes back by undo."""


def render(text: str) -> str:
    """`text`, read as Markdown, as HTML that executes nothing, loads nothing and styles nothing.

    A text that is too long to be read as Markdown, or that nests too deeply, is shown as it is.
    """
    text = well_formed(text)
    if len(text) > MAX_MARKDOWN:
        return f"<pre>{html.escape(text)}</pre>"
    lines = text.split("\n")
    cells = len(lines) * max(line.count("|") for line in lines)
    return CLEANER.clean(PARSERS[cells <= MAX_TABLE_CELLS].render(text))


def well_formed(text: str) -> str:
    """`text` with a replacement character for what no UTF-8 can say: half of a surrogate pair, and null."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "�")


def shown(text: str) -> dict[str, str]:
    """A text for the page: rendered, and as it is."""
    return {"html": markdown_html(text), "text": well_formed(text)}


def turns(prompt: Prompt) -> list[Message]:
    """The turns of a chat; a plain text is one turn, of the role `prompt`."""
    return [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt


def task_json(task: Task) -> dict[str, Any]:
    """What the browser learns of a task. Texts in the shown order; nothing that says which policy wrote them."""
    return {
        "assignment_id": task.assignment_id,
        "kind": task.kind,
        "prompt": [{"role": well_formed(turn["role"]), **shown(turn["content"])} for turn in turns(task.prompt)],
        "responses": [shown(response) for response in task.responses],
        "lease_expires_ms": task.lease_expires_ms,
        "previous": asdict(task.previous) if task.previous else None,
        "passed_over": task.passed_over,
    }
