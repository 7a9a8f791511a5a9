"""The admin page's figures, against numbers counted by hand on a small project."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from label_client import Browser, Web, candidates, log_in

from reward_model.labeling import figures, links
from reward_model.labeling.figures import DAY_MS, HOUR_MS, Agreement, Period
from reward_model.labeling.records import Answer, Item

REFRESH = '<meta http-equiv="refresh" content="3; url=/admin">'
TIMES = [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000, 60_000]


class Tables(HTMLParser):
    """The cells of every row of a page, as text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th") or (self._open and tag not in ("tr", "option"))
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def row(self, head: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == head)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path, judgments_per_item=2, gold={"fraction": 0.0}, repeat_fraction=0.0)
    yield web
    web.store.close()


def numbers(page: str) -> dict[str, str]:
    found = re.findall(r'<p class="stat"><b>([^<]*)</b><span>([^<]*)</span>', page)
    return {name: number for number, name in found}


def prefer(browser: Browser, text: str, **answer: Any) -> Any:
    """The response of this text is better, wherever it stands."""
    places = [response["text"] for response in browser.get("/api/task").json()["task"]["responses"]]
    return browser.judge(value=-2 if places[0] == text else 2, **answer)


def test_an_empty_project_has_a_page(web: Web) -> None:
    page = web.invited("root", "admin").get("/admin")
    assert page.status_code == 200
    assert numbers(page.text)["of 0 judgments"] == "0"
    assert numbers(page.text)["per judgment, median"] == "-"
    assert "undefined (no judgments)" in page.text
    assert "Nobody has judged anything yet." in page.text


def test_progress_and_states(web: Web) -> None:
    root, ada, ben = web.invited("root", "admin"), web.invited("ada"), web.invited("ben")
    web.add_pairs(4, wanted=2)
    for browser in (ada, ben):
        prefer(browser, "better")
    ada.judge("flag", notes="is this a question?")
    ada.judge("both_bad")
    ada.judge("skip")
    stats = numbers(root.get("/admin").text)
    # Wanted 8; the first item has both of its judgments, the third one (both bad decides), the flagged one is held.
    assert stats["of 8 judgments"] == "3"
    assert (stats["items done"], stats["items open"], stats["flagged"], stats["retired"]) == ("1", "2", "1", "0")

    page = root.get("/admin").text
    assert "<b><bdi>ada</bdi></b>: is this a question?" in page
    assert '<pre class="flagged-text">user: question 1</pre>' in page
    root.form("/admin/items/2/retire")
    stats = numbers(root.get("/admin").text)
    assert (stats["flagged"], stats["retired"]) == ("0", "1")


def test_agreement_and_annotators(web: Web) -> None:
    root, ada, ben = web.invited("root", "admin"), web.invited("ada"), web.invited("ben")
    web.add_pairs(4, wanted=2)
    for item, ben_says in enumerate(["better", "better", "better", "worse"]):
        prefer(ada, "better", ms_active=1000 * (item + 1))
        prefer(ben, ben_says, ms_active=500)
    page = Tables(root.get("/admin").text)
    assert page.row("Raw agreement") == ["75%", "4"]
    # Nominal alpha by hand: coincidences 6 of better-better, 1 + 1 mixed; D_o = 2/8, D_e = 2 * 7 * 1 / (8 * 7).
    assert page.row("Krippendorff's alpha, side") == ["0.00", "4"]
    names = [row[0] for row in page.rows if row]
    assert names.count("ada") == 2, "once among the annotators, once among the people"
    ada_row, ben_row = page.row("ada"), page.row("ben")
    assert (ada_row[0], ben_row[0]) == ("4", "4")
    assert (ada_row[1], ada_row[3]) == ("-", "-"), "no gold question, no repeat"
    assert (ada_row[4], ben_row[4]) == ("75%", "75%")
    assert ada_row[5:9] == ["0%"] * 4
    assert (ada_row[9], ben_row[9:]) == ("2.5 s", ["0.5 s", "0.5 s"])


def test_unanimous_annotators_have_no_coefficient(web: Web) -> None:
    root, ada, ben = web.invited("root", "admin"), web.invited("ada"), web.invited("ben")
    web.add_pairs(2, wanted=2)
    for _ in range(2):
        prefer(ada, "better")
        prefer(ben, "better")
    page = Tables(root.get("/admin").text)
    assert page.row("Raw agreement") == ["100%", "2"]
    assert page.row("Krippendorff's alpha, side")[0] == "undefined (all agree)"


def test_gold_left_rate_ties_and_skips(tmp_path: Path) -> None:
    web = Web(tmp_path, gold={"fraction": 1.0, "after": 100})
    root, ada = web.invited("root", "admin"), web.invited("ada")
    web.store.add_items(
        Item([{"role": "user", "content": f"gold {i}"}], candidates("worse", "better"), gold_ranks=[2, 1])
        for i in range(4)
    )
    web.add_pairs(4)
    for text in ("better", "better", "worse", "better"):
        prefer(ada, text)
    ada.judge(value=0)
    ada.judge(value=-3)
    ada.judge("skip")
    ada.judge("both_bad")
    gold, left, _, _, ties, bad, skips, flags = Tables(root.get("/admin").text).row("ada")[1:9]
    assert (gold, ties, bad, skips, flags) == ("75%", "12%", "12%", "12%", "0%")
    shown = [j.answer.value for j in web.store.judgments() if j.answer.value]
    assert left == f"{sum(value < 0 for value in shown) / 5:.0%}"
    web.store.close()


def test_days_and_hours_are_utc_s(web: Web) -> None:
    ada = web.invited("ada")
    web.add_pairs(4, wanted=1)
    midnight = web.clock.ms - web.clock.ms % DAY_MS
    for ms in (midnight - DAY_MS - 1, midnight - 1, midnight, midnight + HOUR_MS):
        web.clock.ms = ms
        ada.get("/api/task")
        assert ada.judge().status_code == 200
    now = midnight + 2 * HOUR_MS
    with web.store.read() as session:
        days = figures.judgments_per(session, now, DAY_MS, 9)
        hours = figures.judgments_per(session, now, HOUR_MS, 4)
        assert figures.judgments_per(session, now + 9 * DAY_MS, DAY_MS, 2) == [Period("2027-01-24", 0)]
    assert days == [Period("2027-01-15", 2), Period("2027-01-14", 1), Period("2027-01-13", 1)]
    assert [(hour.start[-5:], hour.judgments) for hour in hours] == [
        ("02:00", 0),
        ("01:00", 1),
        ("00:00", 1),
        ("23:00", 1),
    ]


@pytest.mark.parametrize(("n", "median", "p90"), [(0, None, None), (1, 1, 1), (4, 2, 4), (10, 5, 9)])
def test_seconds_are_nearest_ranks(web: Web, n: int, median: float | None, p90: float | None) -> None:
    ada = web.invited("ada")
    web.add_pairs(13, wanted=1)
    for ms in [*TIMES[:n], 0]:
        ada.judge(ms_active=ms)
    ada.judge("skip", ms_active=99_000)
    with web.store.read() as session:
        assert figures.seconds_per_item(session) == (None if median is None else (median, p90))


def test_what_was_withdrawn_or_said_by_a_machine_counts_nowhere(web: Web) -> None:
    root, ada = web.invited("root", "admin"), web.invited("ada")
    web.add_pairs(2, wanted=1)
    ada.judge(ms_active=9000)
    ada.json("/api/undo", {})
    key = web.store.items()[1].key
    web.store.record("judge", "judge", key, [0, 1], Answer("compare", 3), presentation=0, submission_id="judge-1-aaaa")
    with web.store.read() as session:
        assert figures.seconds_per_item(session) is None
        assert figures.judgments_per(session, web.clock.ms, DAY_MS, 1)[0].judgments == 0
    page = Tables(root.get("/admin").text)
    assert numbers(root.get("/admin").text)["of 2 judgments"] == "0"
    assert page.row("judgejudge")[0] == "1", "the judge stands among the annotators, and is called one"


def test_the_report_is_kept_for_a_while(web: Web) -> None:
    now = [0.0]
    ada = web.invited("ada")
    web.add_pairs(2, wanted=1)
    agreement = Agreement(web.store, 0, lambda: now[0])
    agreement.patience = 120.0

    def judgments() -> int:
        report = agreement.report()
        assert report
        return report["counts"]["judgments"]

    ada.judge()
    assert judgments() == 1
    ada.judge()
    now[0] += figures.KEPT_SECONDS - 0.1
    assert judgments() == 1
    now[0] += 0.2
    assert judgments() == 2


def test_nobody_waits_for_a_slow_report(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    root = web.invited("root", "admin")
    agreement = web.app.state.site.agreement
    agreement.patience = 0.01
    release, calls, judgments = threading.Event(), [], web.store.judgments

    def slow() -> Any:
        calls.append(1)
        assert release.wait(60)
        return judgments()

    monkeypatch.setattr(web.store, "judgments", slow)
    for _ in range(2):
        page = root.get("/admin")
        assert page.status_code == 200
        assert page.text.count("The figures are being computed") == 2
        assert "Raw agreement" not in page.text
        assert REFRESH in page.text
    made = root.form("/admin/invites", {"role": "viewer"}).text
    assert "/invite/" in made
    assert REFRESH not in made, "a link that is shown once would vanish"
    release.set()
    agreement.patience = 120.0
    page = root.get("/admin").text
    assert "Raw agreement" in page
    assert REFRESH not in page
    assert calls == [1], "one report at a time"


def test_a_report_that_fails_takes_no_page_with_it_and_is_tried_again(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    root = web.invited("root", "admin")
    web.app.state.site.agreement = agreement = Agreement(web.store, 0, lambda: now[0])
    agreement.patience = 120.0
    with monkeypatch.context() as broken:
        broken.setattr(web.store, "items", lambda: 1 / 0)
        page = root.get("/admin")
        assert page.status_code == 200
        assert page.text.count("The figures could not be computed") == 2
        assert REFRESH not in page.text
        assert "/invite/" in root.form("/admin/invites", {"role": "viewer"}).text
        assert caplog.text.count("ZeroDivisionError") == 1, "not at once again"
    now[0] += figures.KEPT_SECONDS
    assert "Raw agreement" in root.get("/admin").text


def test_viewers_see_the_figures_and_no_button(web: Web) -> None:
    root, eye = web.invited("root", "admin"), web.invited("eye", "viewer")
    ada = web.invited("ada")
    web.add_pairs(1)
    ada.judge("flag")
    seen, managed = eye.get("/admin").text, root.get("/admin").text
    assert managed.count('action="/admin/') > 5
    assert 'action="/admin/' not in seen
    assert 'href="/admin/audit"' not in seen
    assert "Raw agreement" in seen


def test_an_invite_link_is_shown_once_and_works(web: Web) -> None:
    root = web.invited("root", "admin")
    page = root.form("/admin/invites", {"role": "viewer"}).text
    link = re.search(r"http://127\.0\.0\.1:8420(/invite/[\w-]{43})", page)
    assert link
    assert web.browser().get(link[1]).status_code == 200
    page = root.get("/admin").text
    assert link[1] not in page
    assert re.search(r"viewer, by <bdi>root</bdi>, until 2027-01-22 08:00 UTC", page)


def test_an_admin_who_sits_at_the_server_gets_a_link_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_own_address", lambda _: "10.0.0.7")
    web = Web(tmp_path, serve={"host": "0.0.0.0"})
    page = web.invited("root", "admin").form("/admin/invites", {"role": "viewer"}).text
    assert re.search(r">http://10\.0\.0\.7:8420/invite/[\w-]{43}<", page)
    assert "If others cannot open http://10.0.0.7:8420, set serve.public_url" in page
    tunnel = web.invited("tunnel", "admin", base="http://127.0.0.1:9000")
    page = tunnel.form("/admin/invites", {"role": "viewer"}).text
    assert re.search(r">http://10\.0\.0\.7:8420/invite/[\w-]{43}<", page), "the server's port, not the tunnel's"
    far = web.invited("far", "admin", base="http://172.16.0.9:8420")
    page = far.form("/admin/invites", {"role": "viewer"}).text
    assert re.search(r">http://172\.16\.0\.9:8420/invite/[\w-]{43}<", page), "as this admin came"
    web.store.close()


def test_accounts_and_figures_work_on_postgresql_too(
    postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABELS_DATABASE", postgres.database())
    web = Web(tmp_path, database_env="LABELS_DATABASE", gold={"fraction": 0.0})
    root, ada = web.invited("root", "admin"), web.invited("Ärger")
    web.add_pairs(5, wanted=1)
    for ms in (1000, 2000, 3000):
        prefer(ada, "better", ms_active=ms)
    ada.judge("flag", notes="odd")
    assert log_in(web.browser(), "ÄRGER", "wrong password").status_code == 401
    assert log_in(web.browser(), "ÄRGER").status_code == 303
    page = root.get("/admin").text
    stats = numbers(page)
    # The fifth item is before its annotator: its only place is taken, and it is not done.
    assert (stats["of 5 judgments"], stats["items done"], stats["items open"], stats["flagged"]) == ("3", "3", "1", "1")
    assert (stats["per judgment, median"], stats["90th percentile"]) == ("2.0 s", "3.0 s")
    assert Tables(page).row("2027-01-15")[0] == "3"
    assert "<b><bdi>Ärger</bdi></b>: odd" in page
    for path in ("users/1/deactivate", "users/2/deactivate", "users/2/activate", "users/2/unpause", "items/4/reopen"):
        assert root.form(f"/admin/{path}").status_code == (409 if path == "users/1/deactivate" else 303)
    with web.store.read() as session:
        assert [event.kind for event in figures.events(session)][:2] == ["item_reopened", "user_unpaused"]
    web.store.close()
