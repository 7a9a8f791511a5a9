"""Model output as HTML: nothing that executes, loads or styles passes; what Markdown means is kept."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import hostile_texts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_model.labeling import rendering
from reward_model.labeling.records import Answer
from reward_model.labeling.rendering import MAX_MARKDOWN, TAGS, markdown_html, task_json
from reward_model.labeling.store import Task

ATTRIBUTES = {"a": {"href", "target", "rel"}, "ol": {"start"}}
PIECES = [
    "[",
    "]",
    "(",
    ")",
    "<",
    ">",
    "![",
    "`",
    "```",
    "*",
    "_",
    "~~",
    "|",
    "\n",
    "\n\n",
    "- ",
    "> ",
    "# ",
    "\\",
    "&",
    ";",
]
PIECES += [
    "javascript:",
    "data:",
    "http://",
    "www.",
    "//",
    "script",
    "svg",
    " onload=",
    "alert(1)",
    '"',
    "'",
    "a@b.com",
    "x",
]


class Faults(HTMLParser):
    """Tags, attributes and links outside of the allow-list, and text that a page must not hold."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            self.found.append(tag)
        for name, value in attrs:
            if name not in ATTRIBUTES.get(tag, ()):
                self.found.append(f"{tag} {name}")
            if name == "href" and not (value or "").startswith(("http://", "https://", "mailto:")):
                self.found.append(f"href {value}")
        if tag == "a" and dict(attrs).get("rel") != "noopener noreferrer nofollow":
            self.found.append("rel")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


@pytest.mark.parametrize("text", hostile_texts.TEXTS, ids=range(len(hostile_texts.TEXTS)))
def test_hostile_text_gives_harmless_html(text: str) -> None:
    parsed = Faults(markdown_html(text))
    assert not parsed.found
    assert parsed.text.strip()  # shown, not swallowed


def test_there_are_enough_hostile_texts() -> None:
    assert len(set(hostile_texts.TEXTS)) >= 60


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_random_mixtures_give_harmless_html(text: str) -> None:
    assert not Faults(markdown_html(text)).found


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* ~~d~~ `e`", "<p>a <strong>b</strong> <em>c</em> <s>d</s> <code>e</code></p>"),
        ("one\ntwo\n\nthree", "<p>one<br>\ntwo</p>\n<p>three</p>"),
        ("# T\n- a\n- b", "<h1>T</h1>\n<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
        ("3. a", '<ol start="3">\n<li>a</li>\n</ol>'),
        ("```python\nx < 1\n```", "<pre><code>x &lt; 1\n</code></pre>"),
        ("> q", "<blockquote>\n<p>q</p>\n</blockquote>"),
        ("![a *b*](http://x.y/z.png)", "<p>[image: a b]</p>"),
        ("1 < 2 && <b>3</b>", "<p>1 &lt; 2 &amp;&amp; &lt;b&gt;3&lt;/b&gt;</p>"),
        ("\ud800\0", "<p>��</p>"),
        ("", ""),
    ],
)
def test_markdown(text: str, html: str) -> None:
    assert markdown_html(text).strip() == html


@pytest.mark.parametrize("text", ["[x](https://a.org/b)", "https://a.org/b", "<https://a.org/b>"])
def test_links_open_elsewhere_and_tell_nothing(text: str) -> None:
    shown = "x" if text.startswith("[") else "https://a.org/b"
    link = f'<a href="https://a.org/b" target="_blank" rel="noopener noreferrer nofollow">{shown}</a>'
    assert markdown_html(text).strip() == f"<p>{link}</p>"


def test_tables() -> None:
    parsed = Faults(html := markdown_html("|a|b|\n|-|-|\n|1|2|"))
    assert (html.count("<th>"), html.count("<td>"), parsed.found) == (2, 2, [])


def test_a_text_that_is_too_long_is_shown_as_it_is() -> None:
    text = "*a* <b>\n" * (MAX_MARKDOWN // 8 + 1)
    html = markdown_html(text)
    assert html.startswith("<pre>*a* &lt;b&gt;\n*a*")
    assert "<em>" not in html
    assert "<em>" in markdown_html(text[:MAX_MARKDOWN])


def test_a_table_cannot_be_made_huge_by_few_characters() -> None:
    """Rows are filled up to the width of the header: 6,000 characters would become 65,000 cells."""
    text = "|" + "a|" * 500 + "\n|" + "-|" * 500 + "\n" + "|\n" * 2000
    assert len(markdown_html(text)) < 3 * len(text)


def task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "assignment_id": 7,
        "item_id": 3,
        "kind": "pair",
        "prompt": [{"role": "user", "content": "*Why*?"}],
        "responses": ["<b>", "two"],
        "lease_expires_ms": 1000,
        "previous": None,
    }
    return Task(**(fields | changes))


def test_a_task_as_json_is_blind_and_shows_texts_twice() -> None:
    assert task_json(task()) == {
        "assignment_id": 7,
        "kind": "pair",
        "prompt": [{"role": "user", "html": "<p><em>Why</em>?</p>\n", "text": "*Why*?"}],
        "responses": [{"html": "<p>&lt;b&gt;</p>\n", "text": "<b>"}, {"html": "<p>two</p>\n", "text": "two"}],
        "lease_expires_ms": 1000,
        "previous": None,
        "passed_over": 0,
    }


def test_a_plain_prompt_is_one_turn_and_what_was_chosen_comes_along() -> None:
    answer = Answer("compare", value=-2, confidence=4, notes="n", ms_active=5)
    content = task_json(task(prompt="Why?", previous=answer))
    assert content["prompt"] == [{"role": "prompt", "html": "<p>Why?</p>\n", "text": "Why?"}]
    assert content["previous"]["value"] == -2
    assert content["previous"]["notes"] == "n"


@pytest.mark.parametrize("text", hostile_texts.CHARACTERS)
def test_json_can_be_sent_whatever_the_characters(text: str) -> None:
    content = task_json(task(prompt=text, responses=[text, text]))
    json.dumps(content, ensure_ascii=False).encode("utf-8")


def test_what_is_kept_of_rendered_texts_is_bounded_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []

    def render(text: str) -> str:
        rendered.append(text)
        return text * 2

    monkeypatch.setattr(rendering, "render", render)
    texts = rendering.RenderedTexts(limit=90)
    a, b, c = "a" * 10, "b" * 10, "c" * 10
    for text in (a, b, a, c, a):
        assert texts(text) == text * 2
    assert (rendered, texts.characters) == ([a, b, c], 90)
    assert texts("d") == "dd"
    assert texts.characters == 63, "b, not used for the longest time, has left"
    texts(a)
    texts(c)
    assert rendered == [a, b, c, "d"]
    assert texts("e" * 31) == "e" * 62
    assert texts.characters == 63, "longer than all that may be kept: nothing leaves for it"
    texts(b)
    assert (rendered[-1], texts.characters) == (b, 63 - 3 + 30)


def test_hundreds_of_long_texts_leave_memory_free() -> None:
    for number in range(400):
        rendering.markdown_html(f"{number} " + "&" * rendering.MAX_MARKDOWN)
    assert rendering.markdown_html.characters <= 16_000_000
