"""The labeling page in a real browser, against the real server and store."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import hostile_texts
import pytest
import uvicorn

from reward_model.labeling import accounts, app, serve
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from reward_model.labeling.schema import SessionRow
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
GUARD_MS = 270
"""A little longer than a new item takes no answer."""
TIMEOUT_MS = 20_000


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait for what is asserted."""
    from playwright.sync_api import expect

    return expect(locator)


@dataclass
class Site:
    """A labeling project that is being served."""

    store: LabelStore
    url: str
    cfg: LabelingStage

    def judgments(self, *, effective: bool = True) -> list[Judgment]:
        return self.store.judgments(effective=effective)

    def account(self, name: str, role: str = "annotator") -> None:
        accounts.accept_invite(self.store, accounts.create_invite(self.store, role, None), name, "long password")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Serves items; keyword arguments change the project's configuration."""
    stops = []

    def start(items: list[Item], **changes: Any) -> Site:
        defaults = {"run_dir": str(tmp_path), "repeat_fraction": 0, "gold": {"fraction": 0}}
        cfg = LabelingStage.model_validate(defaults | changes | {"serve": {"port": 0} | changes.get("serve", {})})
        store = LabelStore.open(cfg)
        store.add_items(items)
        listener = serve.listen(cfg.serve)
        server = uvicorn.Server(serve.server_config(app.make_app(store, cfg), cfg.serve))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join()
            listener.close()
            store.close()

        stops.append(stop)
        return Site(store, serve.url_of(cfg.serve, listener.getsockname()[1]), cfg)

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser of its own. Errors of the page's script, and requests to elsewhere, fail the test."""
    contexts, errors = [], []
    requests: list[str] = []

    def open_page(url: str, script: str = "", **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.add_init_script(script)
        page.clock.install()  # time runs as ever, but can be moved on
        page.goto(url)
        if app_of(page).count():
            expect(app_of(page)).not_to_have_attribute("data-state", "loading")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert not [url for url in requests if not url.startswith(("http://127.0.0.1:", "about:"))]


def pairs(number: int, **fields: Any) -> list[Item]:
    return [
        Item(f"Question {i}", [Candidate(f"first {i}", "policy-one"), Candidate(f"second {i}", "policy-two")], **fields)
        for i in range(number)
    ]


def ranking(prompt: str) -> Item:
    return Item(prompt, [Candidate(f"text {name}", f"policy-{name}") for name in "pqrs"], kind="ranking")


def app_of(page: Any) -> Any:
    return page.locator("#app")


@contextmanager
def another_item(page: Any) -> Iterator[None]:
    """Lets the guard of a new item run out; then, after the body, waits for another item or a notice."""
    page.clock.fast_forward(GUARD_MS)
    before = app_of(page).get_attribute("data-assignment")
    yield
    page.wait_for_selector("#app[data-assignment]" if before is None else f'#app:not([data-assignment="{before}"])')


def press(page: Any, *keys: str) -> None:
    """Presses keys, the last of which judges the item."""
    with another_item(page):
        for key in keys:
            page.keyboard.press(key)


def texts(page: Any) -> list[str]:
    return page.locator(".response .text").all_inner_texts()


def state(page: Any, expected: str) -> None:
    expect(app_of(page)).to_have_attribute("data-state", expected)


def log_in(page: Any, name: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill("long password")
    page.keyboard.press("Enter")


# --- a session ------------------------------------------------------------------------------------------------


def test_a_session_of_twenty_pairs_by_keyboard(served: Any, opened: Any) -> None:
    """What is pressed is what is stored, about the text that was on that side; the policies are named after that."""
    site = served(pairs(20), judgments_per_item=1)
    page = opened(site.url)
    state(page, "pair")
    chosen = []
    for key, _ in zip(cycle("1234567t0b"), range(20), strict=False):
        left, right = texts(page)
        assert "policy-" not in page.locator("#work").inner_text()
        chosen.append((key, left, right))
        press(page, key)
        policies = ["policy-one" if text.startswith("first") else "policy-two" for text in (left, right)]
        if key != "0":  # the last one leads to an empty page
            expect(page.locator("#last bdi")).to_have_text(policies)
    state(page, "empty")
    items = {item.key: item for item in site.store.items()}
    for (key, left, right), judgment in zip(chosen, site.judgments(), strict=True):
        item = items[judgment.item_key]
        assert [item.responses[response].text for response in judgment.order] == [left, right]
        assert judgment.answer.choice == ("both_bad" if key == "b" else "compare")
        assert judgment.answer.value == (None if key == "b" else 0 if key in "t0" else int(key) - 4)
        assert 200 < judgment.answer.ms_active < 10_000
    expect(page.locator("#counts")).to_contain_text("yours 20 · now 20")


def test_notes_and_confidence_go_with_the_judgment_and_not_with_the_next(served: Any, opened: Any) -> None:
    site = served(pairs(2))
    page = opened(site.url)
    for key in "ccc":
        page.keyboard.press(key)
    page.keyboard.press("n")
    page.keyboard.type("both cite 3 sources?")  # letters and digits are text here, not judgments
    page.keyboard.press("Escape")
    press(page, "5")
    press(page, "3")
    first, second = [judgment.answer for judgment in site.judgments()]
    assert (first.value, first.confidence, first.notes) == (1, 3, "both cite 3 sources?")
    assert (second.value, second.confidence, second.notes) == (-1, None, "")


def test_undo_brings_the_item_back_with_what_was_chosen(served: Any, opened: Any) -> None:
    site = served(pairs(3))
    page = opened(site.url)
    page.keyboard.press("u")
    expect(page.locator("#status")).to_have_text("There is nothing to undo.")
    before = texts(page)
    page.keyboard.press("c")
    press(page, "6")
    press(page, "u")
    assert texts(page) == before
    expect(page.locator(".before")).to_have_attribute("data-do", "6")
    expect(page.locator("#last")).to_be_hidden()
    press(page, "2")
    assert [(j.answer.value, j.answer.confidence) for j in site.judgments()] == [(-2, 1)]
    assert [j.answer.choice for j in site.judgments(effective=False)] == ["compare", "undo", "compare"]


def test_undo_of_a_skip_that_others_have_says_so_and_goes_on(served: Any, opened: Any) -> None:
    site = served(pairs(4))
    page, other = opened(site.url), site.store.ensure_user("other", role="annotator")
    press(page, "s")
    assert site.store.next_task(other).prompt == "Question 0"
    before = texts(page)
    page.keyboard.press("u")
    expect(page.locator("#status")).to_contain_text("What you skipped or flagged last cannot come back")
    assert (texts(page), app_of(page).get_attribute("data-state")) == (before, "pair"), "the item stays"
    press(page, "6")
    site.store.submit(other, site.store.next_task(other).assignment_id, Answer("compare", value=1), "others-one")
    press(page, "s")
    assert site.store.next_task(other).prompt == "Question 2"
    press(page, "u")
    expect(page.locator("#status")).to_contain_text("The item that you skipped or flagged last cannot come back.")
    expect(page.locator(".before")).to_have_attribute("data-do", "6")
    assert texts(page) == before


def test_skip_and_flag(served: Any, opened: Any) -> None:
    site = served(pairs(3))
    page = opened(site.url)
    press(page, "s")
    page.keyboard.press("f")
    page.keyboard.press("Escape")  # no flag after all
    expect(page.locator("#flag")).to_be_hidden()
    page.keyboard.press("f")
    page.keyboard.type("4 is not a number")
    press(page, "Enter")
    assert [(j.answer.choice, j.answer.notes) for j in site.judgments()] == [
        ("skip", ""),
        ("flag", "4 is not a number"),
    ]
    assert list(site.store.item_states().values()).count("flagged") == 1


def test_what_was_done_is_said_in_the_buttons_words(served: Any, opened: Any) -> None:
    site = served([Item(f"Why {i}?", [Candidate("one"), Candidate("two")]) for i in range(3)])
    page = opened(site.url)
    page.keyboard.press("u")
    said = page.locator("#status")
    visible = "e => e.getBoundingClientRect().width > 100"
    expect(said).to_have_text("There is nothing to undo.")
    assert said.evaluate(visible)
    press(page, "b")
    expect(page.locator("#last")).to_have_text("Last: Both bad.")  # nobody's names, and none called so
    press(page, "s")
    expect(page.locator("#counts")).to_contain_text("yours 1 · now 1 ")
    press(page, "u")
    expect(said).to_contain_text("Undone.")
    assert said.evaluate(visible)
    expect(page.locator("#counts")).to_contain_text("yours 1 · now 1 ")
    press(page, "u")
    expect(page.locator("#counts")).to_contain_text("yours 0 · now 0 ")
    page.clock.fast_forward(10_000)  # on a phone it covers the links at the top
    expect(said).to_contain_text("Undone.")
    assert not said.evaluate(visible)
    press(page, "1")
    expect(said).to_have_text("")
    assert not said.evaluate(visible)


def test_after_the_last_item_the_page_soon_looks_again(served: Any, opened: Any) -> None:
    """What it shows of the project's progress may be older than the last answer."""
    site = served(pairs(1))
    page = opened(site.url)
    press(page, "1")
    state(page, "empty")
    with page.expect_request("**/api/task"):
        page.clock.pause_at(page.evaluate("Date.now()") / 1_000 + 2)


RANKINGS = {
    "3 1 4 2": [2, 4, 1, 3],
    "3 1 = 4 2": [1, 3, 1, 2],
    "1 t 2 t 3 4 t": [1, 1, 2, 2],
    "1 2 3 4 2 ArrowLeft": [2, 1, 3, 4],
    "1 2 3 4 1 ArrowRight ArrowRight": [3, 1, 2, 4],
    "1 2 x 4 3 2 1": [4, 3, 2, 1],
    "1 2 3 Backspace Backspace 3 4 2": [1, 4, 2, 3],
    "1 2 3 4 2 Backspace 2 =": [1, 3, 2, 3],
    "4 4 3 2 1 9 ArrowRight": [4, 3, 2, 1],
    "1 2 3 = 2 Backspace 2 4": [1, 3, 2, 4],
    "3 1 = 2 ArrowLeft 4": [2, 1, 2, 3],
    "1 2 = 3 4 2 ArrowLeft": [2, 1, 3, 4],
    "1 2 = 3 4 1 ArrowRight ArrowRight": [3, 1, 2, 4],
    "1 2 3 = 4 = 3 t": [1, 2, 3, 3],
    "1 2 = 3 = 4 =": [1, 1, 1, 1],
}
"""Keys, and the ranks by place that they mean; worked out by hand."""


def test_ranking_by_keyboard(served: Any, opened: Any) -> None:
    site = served([ranking(f"Which {i}?") for i in range(len(RANKINGS))])
    page = opened(site.url)
    state(page, "ranking")
    for keys in RANKINGS:
        page.keyboard.press("Enter")  # too early: nothing has a place
        press(page, *keys.split(), "Enter")
    assert [judgment.answer.ranks for judgment in site.judgments()] == list(RANKINGS.values())
    expect(page.locator("#last")).to_contain_text("1 = 2 = 3 = 4")


def test_ranking_by_pointer_and_undo(served: Any, opened: Any) -> None:
    site = served([ranking("Which?")])
    page = opened(site.url, viewport={"width": 390, "height": 844}, has_touch=True)
    page.clock.fast_forward(GUARD_MS)
    for place in (1, 0, 3, 2):
        page.locator(".response .place").nth(place).tap()
    expect(page.locator("#order .place")).to_have_text(["2", "1", "4", "3"])
    page.get_by_role("button", name="Tie").tap()
    page.get_by_role("button", name="Submit").tap()
    state(page, "empty")
    page.get_by_role("button", name="Undo the last one").tap()
    state(page, "ranking")
    expect(page.locator(".rank")).to_have_text(["rank 2", "rank 1", "rank 3", "rank 3"])
    assert [judgment.answer.ranks for judgment in site.judgments(effective=False)] == [[2, 1, 3, 3], None]


# --- several people -------------------------------------------------------------------------------------------


def test_two_annotators_at_once(served: Any, opened: Any) -> None:
    """Of items with one judgment each, nobody gets one that the other has or had."""
    site = served(pairs(6), serve={"accounts": True})
    pages = []
    for name in ("ann", "bob"):
        site.account(name)
        pages.append(opened(f"{site.url}/"))
        log_in(pages[-1], name)
        state(pages[-1], "pair")
    seen = []
    for _ in range(3):
        prompts = [page.locator("#turns").inner_text() for page in pages]
        seen += prompts
        for page in pages:
            press(page, "2")
    assert len(set(seen)) == 6
    for page in pages:
        state(page, "empty")
    assert sorted(judgment.annotator for judgment in site.judgments()) == ["ann"] * 3 + ["bob"] * 3
    # Two judgments are wanted of a new item: both get it, without a reload, and with the sides the other way round.
    site.store.add_items([Item("For both", [Candidate("x"), Candidate("y")], wanted=2)])
    for page in pages:
        page.clock.fast_forward(16_000)
        state(page, "pair")
    assert sorted(texts(page)[0] for page in pages) == ["x", "y"]
    for page in pages:
        press(page, "1")
        state(page, "empty")
    assert [judgment.annotator for judgment in site.judgments()[6:]] == ["ann", "bob"]


def test_wrong_answers_to_gold_questions_pause(served: Any, opened: Any) -> None:
    gold = pairs(4, gold_ranks=[1, 2])
    site = served(gold, gold={"fraction": 1, "after": 2, "pause_below": 0.6})
    page = opened(site.url)
    for _ in range(2):
        press(page, "7" if texts(page)[0].startswith("first") else "1")
    state(page, "paused")
    expect(page.locator("#notice")).to_contain_text("were right. What you judged is stored.")
    page.keyboard.press("u")
    expect(page.get_by_role("button", name="Look again")).to_be_focused()
    page.reload()
    state(page, "paused")
    assert len(site.judgments()) == 2


def test_an_item_that_went_to_somebody_else(served: Any, opened: Any) -> None:
    site = served(pairs(2))
    page = opened(site.url)
    other = site.store.ensure_user("other", role="annotator")
    now = site.store.clock
    site.store.clock = lambda: now() + 3_600_000
    mine = page.locator("#turns").inner_text()
    task = site.store.next_task(other)
    assert task is not None
    assert str(task.prompt) in mine
    press(page, "1")
    state(page, "lost")
    with another_item(page):
        page.keyboard.press("Enter")  # the button that leads on has the focus
    state(page, "pair")
    assert page.locator("#turns").inner_text() != mine
    assert not site.judgments()


def test_two_tabs_of_one_person_judge_an_item_once(served: Any, opened: Any) -> None:
    site = served(pairs(2))
    first, second = opened(site.url), opened(site.url)
    assert texts(first) == texts(second)
    press(first, "1")
    press(second, "7")
    state(second, "lost")
    expect(second.locator("#notice")).to_contain_text("You have judged this item already.")
    with another_item(second):
        second.keyboard.press("Enter")
    assert texts(second) == texts(first), "both go on with the next item"
    assert [judgment.answer.value for judgment in site.judgments()] == [-3]


def test_a_project_without_items_says_so(served: Any, opened: Any) -> None:
    page = opened(served([]).url)
    state(page, "empty")
    expect(page.locator("#notice")).to_contain_text("No items are queued yet.")


def test_who_was_logged_out_loses_nothing(served: Any, opened: Any) -> None:
    site = served(pairs(2), serve={"accounts": True})
    site.account("ann")
    page = opened(site.url)
    log_in(page, "ann")
    state(page, "pair")
    with site.store.begin() as session:
        session.query(SessionRow).delete()
    press(page, "7")
    state(page, "logged-out")
    assert not site.judgments()
    page.keyboard.press("Enter")
    log_in(page, "ann")
    state(page, "pair")
    assert [judgment.answer.value for judgment in site.judgments()] == [3]
    expect(page.locator("#last")).to_contain_text("Last: sent again.")


# --- trouble --------------------------------------------------------------------------------------------------


def test_a_lost_connection_loses_nothing(served: Any, opened: Any) -> None:
    site = served(pairs(3))
    page = opened(site.url)
    page.clock.fast_forward(GUARD_MS)
    page.context.set_offline(True)
    page.keyboard.press("1")
    expect(page.locator("#status")).to_contain_text("No connection to the server. Your answer is kept.")
    page.keyboard.press("7")  # the item is judged already
    expect(page.locator(".chosen")).to_have_count(1)
    page.context.set_offline(False)
    expect(page.locator("#status")).to_have_text("Next item.")
    assert [judgment.answer.value for judgment in site.judgments()] == [-3]
    assert page.evaluate("localStorage.length") == 0


def test_an_answer_whose_receipt_was_lost_is_stored_once(served: Any, opened: Any) -> None:
    site = served(pairs(3))
    page = opened(site.url)
    lost = []

    def lose_first(route: Any) -> None:
        response = route.fetch()
        if lost:
            route.fulfill(response=response)
        else:
            lost.append(response.status)
            route.abort()

    page.route("**/api/judgments", lose_first)
    press(page, "5")
    state(page, "pair")
    assert lost == [200]
    assert [judgment.answer.value for judgment in site.judgments(effective=False)] == [1]


def test_a_tab_that_is_closed_without_connection_sends_later(served: Any, opened: Any) -> None:
    site = served(pairs(3))
    page = opened(site.url)
    page.route("**/api/judgments", lambda route: route.abort())
    page.clock.fast_forward(GUARD_MS)
    page.keyboard.press("6")
    expect(page.locator("#status")).to_contain_text("Your answer is kept.")
    context = page.context
    page.close()
    assert not site.judgments()
    again = context.new_page()
    again.goto(site.url)
    state(again, "pair")
    expect(again.locator("#last")).to_contain_text("Last: sent again.")
    assert [judgment.answer.value for judgment in site.judgments()] == [2]


def test_an_undo_whose_answer_was_lost_is_not_repeated(served: Any, opened: Any) -> None:
    site = served(pairs(4))
    page = opened(site.url)
    press(page, "1")
    press(page, "2")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/api/undo", lose)
    press(page, "u")
    expect(page.locator("#status")).to_contain_text("look whether this was undone")
    assert [judgment.answer.choice for judgment in site.judgments(effective=False)] == ["compare", "compare", "undo"]


def test_a_double_press_or_a_held_key_judges_one_item(served: Any, opened: Any) -> None:
    site = served(pairs(4))
    page = opened(site.url)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "judgments" in request.url else None)
    with another_item(page):
        page.keyboard.press("1")
        page.keyboard.press("1")
    page.keyboard.press("1")  # at once after the next item came
    with another_item(page):
        page.keyboard.down("2")
    page.clock.fast_forward(GUARD_MS)
    page.keyboard.down("2")  # held: the browser repeats it
    page.keyboard.up("2")
    page.wait_for_timeout(100)
    assert len(sent) == 2
    assert [judgment.answer.value for judgment in site.judgments()] == [-3, -2]


def test_time_counts_while_somebody_is_there(served: Any, opened: Any) -> None:
    """An hour without input is half a minute of work; a minute with input in between is a minute."""
    site = served(pairs(2))
    page = opened(site.url)
    page.clock.fast_forward(3_600_000)
    press(page, "1")
    for _ in range(3):
        page.clock.fast_forward(20_000)
        page.keyboard.press("Shift")
    press(page, "1")
    first, second = [judgment.answer.ms_active for judgment in site.judgments()]
    assert 30_000 <= first < 36_000
    assert 60_000 <= second < 66_000


def test_the_lease_is_renewed_while_somebody_works(served: Any, opened: Any) -> None:
    site = served(pairs(2), lease_minutes=20)
    page = opened(site.url)
    renewals: list[int] = []
    page.on("response", lambda response: renewals.append(response.status) if "renew" in response.url else None)
    page.clock.fast_forward(10 * 60_000)  # nobody is there
    page.clock.fast_forward(10_000)
    assert not renewals
    with page.expect_response("**/api/renew"):
        page.keyboard.press("ArrowDown")
        page.clock.fast_forward(10_000)
    page.keyboard.press("ArrowDown")
    page.clock.fast_forward(10_000)  # the lease has just begun anew
    press(page, "3")
    assert renewals == [200]


def test_instructions_come_by_themselves_once(served: Any, opened: Any) -> None:
    site = served(pairs(2), instructions="Prefer the **true** one.")
    page = opened(site.url)
    expect(page.locator("#instructions strong")).to_have_text("true")
    page.keyboard.press("1")  # closed first: this judges nothing
    page.keyboard.press("Escape")
    press(page, "2")
    page.reload()
    state(page, "pair")
    expect(page.locator("#instructions")).to_be_hidden()
    page.keyboard.press("i")
    expect(page.locator("#instructions")).to_be_visible()
    assert [judgment.answer.value for judgment in site.judgments()] == [-2]


# --- views ----------------------------------------------------------------------------------------------------


def test_raw_text_and_differences(served: Any, opened: Any) -> None:
    responses = [
        "The **sky** is blue, *since* air scatters\nlight.",
        "The **sky** looks blue: air scatters\nall light.",
    ]
    site = served([Item([{"role": "user", "content": "_Why_?"}], [Candidate(text) for text in responses])])
    page = opened(site.url)
    assert page.locator(".response strong").all_inner_texts() == ["sky", "sky"]
    page.keyboard.press("r")
    expect(page.locator(".turn .text")).to_have_text("_Why_?")
    raw = page.locator(".response .text").all_text_contents()
    assert sorted(raw) == sorted(responses)
    page.keyboard.press("d")
    assert page.locator(".response .text").all_text_contents() == raw
    marked = [card.locator("mark").all_text_contents() for card in page.locator(".response").all()]
    assert sorted(marked) == [["is", ", *since*"], ["looks", ":", "all "]]
    page.keyboard.press("d")
    page.keyboard.press("r")
    expect(page.locator("mark")).to_have_count(0)
    assert page.locator(".response strong").all_inner_texts() == ["sky", "sky"]


def test_differences_of_long_texts(served: Any, opened: Any) -> None:
    """Word by word, that would be 10^9 comparisons; lines are compared instead."""
    lines = [f"line {i} " + " ".join(f"word{i * j % 97}" for j in range(20)) for i in range(1500)]
    other = [*lines[:700], "another line", *lines[701:]]
    other[0] = other[-1] = "ends differ"
    site = served([Item("Why?", [Candidate("\n".join(lines)), Candidate("\n".join(other))])])
    page = opened(site.url)
    page.keyboard.press("d")
    expect(page.locator("mark")).to_have_count(6)
    assert len(page.locator("mark").first.text_content()) < 200


def test_an_endless_line_is_wrapped_and_an_empty_response_is_called_so(served: Any, opened: Any) -> None:
    site = served([Item("Why?", [Candidate("word " * 9_000), Candidate("")])])
    page = opened(site.url)
    box = page.locator(".response pre")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth && box.clientHeight > 1000")
    empty = page.locator(".response .text:empty")
    assert "(empty)" in empty.evaluate("box => getComputedStyle(box, '::before').content")


def test_a_heading_of_a_response_looks_like_its_text(served: Any, opened: Any) -> None:
    site = served([Item("Why?", [Candidate("## Part\n\nBecause."), Candidate("### Part\n\nBecause.")])])
    page = opened(site.url, viewport={"width": 390, "height": 844})
    look = "e => (({ color, position, display, padding }) => [color, position, display, padding])(getComputedStyle(e))"
    heading, like = page.locator(".response .text h2"), page.locator(".response .text h3")
    assert heading.evaluate(look) == like.evaluate(look)
    expect(page.locator(".response > h2").first).to_have_css("position", "sticky")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scrolling(served: Any, opened: Any, scheme: str) -> None:
    wide = (
        "x" * 300
        + "\n\n```\n"
        + "y " * 300
        + "\n```\n\n|"
        + "column|" * 30
        + "\n|"
        + "-|" * 30
        + "\n\nhttps://a.org/"
        + "z" * 300
    )
    chat = [{"role": role, "content": wide} for role in ("system", "user", "assistant", "user")]
    items = [
        Item(chat, [Candidate(wide, wide), Candidate(wide + "2", wide)]),
        Item(wide, [Candidate(f"{wide}{k}") for k in range(4)], kind="ranking"),
    ]
    site = served(items, title="A long title of a project " * 3)
    page = opened(site.url, viewport={"width": 390, "height": 844}, color_scheme=scheme)

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        # What is wide scrolls in a box of its own; a box that stuck out would be cut off.
        assert page.evaluate(
            "[...document.querySelectorAll('pre, table')].every((e) => e.getBoundingClientRect().right < 390)"
        )

    for key in ("r", "r", "d", "d", "p", "n", "?"):
        page.keyboard.press(key)
        page.keyboard.press("Escape")
        check()
    press(page, "3")
    check()
    state(page, "ranking")
    for key in "4321":
        page.keyboard.press(key)
    check()


# --- hostile texts --------------------------------------------------------------------------------------------

WATCH = """
window.owned = () => { window.taken = true; };
window.alert = window.confirm = window.prompt = window.owned;
"""
FORBIDDEN = r"""() => {
  const loading = /^(script|style|link|meta|base|iframe|object|embed|img|svg|math|video|audio|template|slot)$/;
  const control = /^(form|input|button|textarea|select|details|dialog)$/;
  const acting = /^(on.*|style|src|srcset|srcdoc|action|formaction|background|xlink.*)$/;
  const found = window.taken ? ['executed'] : [];
  for (const box of document.querySelectorAll('.text, .flagged-text, bdi, #flagged .note')) {
    for (const element of box.querySelectorAll('*')) {
      const tag = element.tagName.toLowerCase();
      if (loading.test(tag) || control.test(tag)) found.push(tag);
      for (const { name, value } of element.attributes) {
        if (acting.test(name) || /^(id|name|class)$/.test(name)) found.push(`${tag} ${name}`);
        if (name === 'href' && !/^(https?:|mailto:)$/.test(element.protocol)) found.push(value);
      }
    }
  }
  return found;
}"""


def hostile_items() -> list[Item]:
    """Every text as a turn, as a response of a ranking and of a pair, and as a policy's name."""
    texts = [text for text in hostile_texts.TEXTS if storable(text)]
    parts = [texts[i : i + 13] for i in range(0, len(texts), 13)]
    items = []
    for part in parts:
        chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(part)]
        items.append(Item(chat, [Candidate(text, text) for text in part], kind="ranking"))
        items.append(Item(chat, [Candidate("\n\n".join(half), part[0]) for half in (part[::2], part[1::2])]))
    return items


def storable(text: str) -> bool:
    """The store refuses what no database holds; test_rendering has those texts too."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def test_hostile_texts_execute_nothing(served: Any, opened: Any) -> None:
    """With the CSP switched off, so that the page's own wall is what holds: as a turn, response, note, policy's name;
    rendered, raw and with differences marked; and on the admin's page."""
    items = hostile_items()
    site = served(items)
    page = opened(site.url, WATCH, bypass_csp=True)
    notes = iter([text[:300] for text in hostile_texts.TEXTS])
    shown = 0
    for _ in items:
        shown += page.locator(".text").count()
        for key in ("r", "r", "d", "d", "p"):
            page.keyboard.press(key)
            assert page.evaluate(FORBIDDEN) == []
        page.keyboard.press("f")
        page.locator("#flag-note").fill("".join(next(notes, "") for _ in range(7)))
        press(page, "Enter")
        assert page.evaluate(FORBIDDEN) == []
    state(page, "empty")
    assert shown > 3 * len(hostile_texts.TEXTS)
    assert next(notes, None) is None
    press(page, "u")  # the last note comes back, into the page's own field
    assert page.evaluate(FORBIDDEN) == []
    page.goto(f"{site.url}/admin")
    expect(page.locator("#flagged")).to_contain_text("alert(1)")
    assert page.evaluate(FORBIDDEN) == []


def test_the_page_reports_no_breach_of_its_own_csp(served: Any, opened: Any) -> None:
    site = served([*hostile_items()[:2], *pairs(1)])
    page = opened(
        site.url,
        "window.breaches = [];"
        "document.addEventListener('securitypolicyviolation', (event) => breaches.push(event.blockedURI));",
    )
    for path in ("/", "/admin"):
        page.goto(site.url + path)
        page.clock.fast_forward(GUARD_MS)
        assert page.evaluate("breaches") == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'owned()'}))")
    assert page.evaluate("breaches") == ["inline"]


# --- admins ---------------------------------------------------------------------------------------------------


def test_retiring_takes_a_second_step_by_keyboard_and_without_script(served: Any, opened: Any) -> None:
    site = served(pairs(2))
    user = site.store.ensure_user("ada", role="annotator")
    task = site.store.next_task(user)
    site.store.submit(user, task.assignment_id, Answer("flag", notes="odd"), "flagged-1")
    page = opened(f"{site.url}/admin", java_script_enabled=False)
    page.locator("details.flagged > summary").focus()
    page.keyboard.press("Enter")
    retire = page.locator("summary", has_text="Retire")
    retire.focus()
    page.keyboard.press("Enter")
    done = page.get_by_role("button", name=f"Retire item {task.item_id} for good")
    expect(done).to_be_visible()
    assert list(site.store.item_states().values()) == ["flagged", "open"], "nothing is done yet"
    expect(page.get_by_text("Nobody gets this item any more")).to_be_visible()
    page.keyboard.press("Tab")
    expect(done).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#flagged")).to_contain_text("None.")
    assert list(site.store.item_states().values()) == ["retired", "open"]


def test_an_admin_sees_the_figures(served: Any, opened: Any) -> None:
    site = served(pairs(4), serve={"accounts": True})
    site.account("ada")
    page = opened(site.url)
    log_in(page, "ada")
    state(page, "pair")
    press(page, "7")
    press(page, "4")
    page.keyboard.press("f")
    page.keyboard.type("broken")
    press(page, "Enter")
    root, ada = (site.store.ensure_user(name, role="admin") for name in ("root", "ada"))
    accounts.set_role(site.store, root, ada, "admin")
    page.reload()
    page.get_by_role("link", name="Admin").click()
    expect(page.locator("#progress")).to_contain_text("2of 4 judgments")
    # The figures are computed beside the requests: the page comes without them, and loads again.
    expect(page.locator("#annotators tbody th")).to_have_text(["ada"], timeout=60_000)
    expect(page.locator("#flagged")).to_contain_text("broken")
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


# --- into training --------------------------------------------------------------------------------------------


def test_what_was_clicked_trains_a_reward_model(served: Any, opened: Any, stage_config: Any) -> None:
    """From the keys to a reward model that ranks held-out prompts as the annotator did."""
    from reward_model import train  # brings torch, which nothing else here needs
    from reward_model.labeling import export
    from rlhf.runs import RunOptions

    good, poor = "the sun is hot", "rain and rain and rain"
    topics = "star light moon sea sky blue red water cloud wind tree leaf bird fish"
    answers = [Candidate(good), Candidate(poor)]
    items = [Item(f"explain {word}", answers[:: 1 if i % 2 else -1]) for i, word in enumerate(topics.split())]
    site = served([*items, *pairs(1)], export={"heldout_fraction": 0.2})
    page = opened(site.url)
    for _ in items:
        press(page, "2" if texts(page)[0] == good else "7")
    press(page, "s")
    files = export.main(site.cfg).outputs
    written = [Path(files[f"preferences_{split}"]).read_text() for split in ("train", "heldout")]
    lines = [json.loads(line) for line in "".join(written).splitlines()]
    assert {(line["chosen"], line["rejected"]) for line in lines} == {(good, poor)}
    assert sorted(line["prompt"] for line in lines) == sorted(str(item.prompt) for item in items)
    cfg = stage_config(
        "reward", dataset={"path": files["pairs_train"]}, heldout_fraction=0.25, optim={"lr": 3e-3}, epochs=4
    )
    assert train.main(cfg, RunOptions()).summary["accuracy"] == 1.0
