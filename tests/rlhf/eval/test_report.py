"""The page is well formed, self-contained, safe with hostile text, and complete; gaps are allowed."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.config_schema import ReportStage
from rlhf.errors import DataError
from rlhf.eval import charts
from rlhf.eval.health import health_notes
from rlhf.eval.pages import clean, inline_code
from rlhf.eval.report import MAX_PROMPTS, build_summary, render_report
from rlhf.eval.rounds import gold_chart
from rlhf.eval.run_files import read_metrics, read_run
from rlhf.stages.report import main

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</p><script>alert('x')</script><img src=http://evil.example/ onerror=alert(1)>\x00\u202e{{ 7*7 }}"
STAGES = ("sft", "sample", "label", "reward", "ppo", "evaluate")


class Page(HTMLParser):
    """Tags in balance, every attribute, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def policy(grade: float, **changes) -> dict:
    base = {
        "answers": 40,
        "grade": grade,
        "grade_interval": [grade - 0.5, grade + 0.5],
        "gold_score": -grade,
        "reward_score": 10 - grade,
        "kl": 3.25,
        "kl_interval": [2.875, 3.625],
        "length_mean": 41.5,
        "eos_frac": 0.9375,
        "distinct_1": 0.40625,
        "distinct_2": 0.78125,
        "entropy": 2.125,
        "perplexity": 11.5,
    }
    return base | changes


def evaluation(**changes) -> dict:
    answers = {
        name: [{"text": f"{name} text", "grade": 7.25, "reward_score": 0.5, "finished": True}]
        for name in ("sft", "ppo")
    }
    win = {"candidate": "ppo", "baseline": "sft", "value": 0.8125, "low": 0.71875, "high": 0.90625}
    return {
        "policies": {"base": policy(13.5), "sft": policy(9.25, kl=0.0), "ppo": policy(5.75)},
        "win_rate": win | {"wins": 31, "ties": 3, "losses": 6, "n": 40},
        "samples": [{"prompt": "Why is the sky blue?", "answers": answers}],
        "notes": [],
    } | changes


def ppo_row(step: int, **changes) -> dict:
    row = {
        "step": step,
        "objective/kl": 0.1 * step,
        "objective/scores": 0.02 * step,
        "objective/rlhf_reward": 0.01 * step,
        "objective/kl_coef": 0.05,
        "policy/entropy_avg": 2.5,
        "policy/approxkl_avg": 0.01,
        "policy/clipfrac_avg": 0.1,
        "loss/policy_avg": -0.01,
        "loss/value_avg": 0.5,
        "val/explained_var": 0.4,
        "response/length_mean": 40.0,
        "response/eos_frac": 0.95,
    }
    return row | changes


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(root: Path, *stages: str) -> ReportStage:
    folders = {f"{stage}_dir": str(root / stage) for stage in stages}
    folders["evaluate_dir"] = str(root / "evaluate")
    return ReportStage(run_dir=str(root / "report"), title="A run", **folders)


@pytest.fixture
def full_run(tmp_path: Path) -> ReportStage:
    write_json(tmp_path / "evaluate/evaluation.json", evaluation())
    for i, stage in enumerate(STAGES):
        result = {"stage": stage, "summary": {}, "wall_s": 100.5 + i, "peak_rss_gb": 2.0 + i, "seed": 3}
        if stage == "reward":
            result["summary"] = {"accuracy": 0.78, "accuracy_low": 0.72, "accuracy_high": 0.83, "pairs": 212}
            result["summary"]["length_correlation"] = 0.21
        write_json(tmp_path / stage / "result.json", result)
        (tmp_path / stage / "config.yaml").write_text("seed: 3\n", encoding="utf-8")
    (tmp_path / "ppo/config.yaml").write_text("kl:\n  kind: adaptive\n  target: 6.0\n", encoding="utf-8")
    versions = {"torch": "2.13.0", "peft": None}
    write_json(tmp_path / "ppo/environment.json", {"python": "3.12.1", "packages": versions})
    write_json(tmp_path / "label/labels_report.json", {"labels": "simulated", "notice": "No `person`."})
    write_lines(tmp_path / "ppo/metrics.jsonl", [ppo_row(i) for i in range(1, 41)])
    write_lines(tmp_path / "sft/metrics.jsonl", [{"step": i, "loss/train": 3 - i / 10} for i in range(1, 9)])
    write_lines(tmp_path / "reward/metrics.jsonl", [{"step": i, "eval/accuracy": 0.7} for i in (5, 10)])
    return config(tmp_path, "sft", "sample", "label", "reward", "ppo")


def leaves(value):
    if isinstance(value, dict):
        for child in value.values():
            yield from leaves(child)
    elif isinstance(value, list):
        for child in value:
            yield from leaves(child)
    elif isinstance(value, int | float):
        yield value


def test_page_is_balanced_and_loads_nothing(full_run):
    page = Page(render_report(full_run))
    assert page.open == []
    assert "script" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on"), f"event handler {name}"
        if name in ("src", "href", "action", "data", "xlink:href", "srcset"):
            assert value.startswith(("#", "data:,")), value
    css = re.search(r"<style>(.*?)</style>", render_report(full_run), re.S).group(1)
    assert "url(" not in css
    assert "@import" not in css
    assert ("http-equiv", "Content-Security-Policy") in page.attributes


def test_every_number_of_the_summary_is_on_the_page(full_run):
    page = Page(render_report(full_run))
    summary = build_summary(full_run)
    for number in leaves(summary):
        assert json.dumps(number) in page.text
    grades, shares = ("13.5", "9.2", "5.8"), ("81%", "72%\u201391%", "78%", "94%")
    for shown in (*grades, *shares, "10 min 18 s", "212 pairs", "target 6"):
        assert shown in page.text, shown


def test_summary_has_the_promised_keys(full_run):
    summary = build_summary(full_run)
    assert summary["wall_s"] == pytest.approx(sum(100.5 + i for i in range(6)))
    assert summary["peak_rss_gb"] == 7.0
    assert summary["stages"]["ppo"] == {"wall_s": 104.5, "peak_rss_gb": 6.0}
    model = summary["reward_model"]
    assert (model["accuracy"], model["accuracy_low"], model["accuracy_high"]) == (0.78, 0.72, 0.83)
    assert [summary["policy"][name]["grade"] for name in ("base", "sft", "ppo")] == [13.5, 9.25, 5.75]
    assert summary["policy"]["kl"] == 3.25
    assert summary["policy"]["win_rate"] == 0.8125
    assert summary["policy"]["win_rate_interval"] == [0.71875, 0.90625]
    assert summary["policy"]["ppo"]["distinct_2"] == 0.78125
    assert (summary["seed"], summary["labels"]) == (3, "simulated")
    assert summary["warnings"] == []


def test_verdict_speaks_of_the_interval(full_run):
    folder = Path(full_run.evaluate_dir)
    cases = {
        (0.7, 0.9): "PPO beats SFT.",
        (0.4, 0.6): "PPO and SFT cannot be told apart.",
        (0.1, 0.3): "PPO loses to SFT.",
    }
    for (low, high), headline in cases.items():
        win = evaluation()["win_rate"] | {"low": low, "high": high, "value": (low + high) / 2}
        write_json(folder / "evaluation.json", evaluation(win_rate=win))
        assert headline in Page(render_report(full_run)).text


def test_hostile_text_stays_text(full_run):
    record = evaluation()
    hostile_policy = "<b>ppo</b>"
    record["policies"][hostile_policy] = policy(5.0)
    record["samples"][0]["prompt"] = HOSTILE
    record["samples"][0]["answers"]["ppo"][0]["text"] = HOSTILE + "\ud800"
    record["samples"][0]["answers"][hostile_policy] = [{"text": HOSTILE, "grade": None, "finished": False}]
    record["notes"] = [HOSTILE, "`<i>`"]
    write_json(Path(full_run.evaluate_dir) / "evaluation.json", record)
    write_json(Path(full_run.label_dir) / "labels_report.json", {"labels": "simulated", "notice": HOSTILE})
    full_run.title = HOSTILE
    html = render_report(full_run)
    html.encode("utf-8")  # a lone surrogate would raise
    page = Page(html)
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert "<b>ppo" not in html
    assert "<i>" not in html.replace("<i>\u2192</i>", "")
    assert all(not name.startswith("on") for name, _ in page.attributes)
    assert not set("\x00\u202e\ud800") & set(html)
    assert page.text.count("<script>alert('x')</script>") >= 6
    assert "{{ 7*7 }}" in page.text


def test_evaluation_alone_is_enough(tmp_path):
    bare = {"policies": {"ppo": {"answers": 1, "grade": None}}}
    write_json(tmp_path / "evaluate/evaluation.json", bare)
    cfg = config(tmp_path)
    page = Page(render_report(cfg))
    assert page.open == []
    assert "svg" not in page.tags
    summary = build_summary(cfg)
    assert summary["labels"] is None
    assert summary["policy"]["win_rate"] is None
    assert summary["wall_s"] is None


def test_a_missing_series_is_only_left_out(full_run):
    before = Page(render_report(full_run))
    assert "Explained variance" in before.text
    rows = [{k: v for k, v in ppo_row(i).items() if k != "val/explained_var"} for i in range(1, 5)]
    rows[1]["objective/kl"] = math.nan
    rows[2]["objective/scores"] = None
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", rows)
    after = Page(render_report(full_run))
    assert "Explained variance" not in after.text
    assert after.tags.count("svg") == before.tags.count("svg") - 1
    assert "nan" not in " ".join(value or "" for _, value in after.attributes).lower()


def test_missing_or_damaged_evaluation_names_the_file_and_the_command(tmp_path):
    with pytest.raises(DataError, match=r"evaluation\.json does not exist") as caught:
        render_report(config(tmp_path))
    assert "python -m rlhf evaluate" in caught.value.fix
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        build_summary(config(tmp_path))
    write_json(tmp_path / "evaluate/evaluation.json", {"policies": {}})
    with pytest.raises(DataError, match="has no policies"):
        build_summary(config(tmp_path))
    write_json(tmp_path / "evaluate/evaluation.json", {"policies": {"win_rate": {}}})
    with pytest.raises(DataError, match="named 'win_rate'"):
        build_summary(config(tmp_path))


def test_no_more_than_ten_prompts_and_all_their_answers(full_run):
    record = evaluation()
    many = [{"text": f"answer {i}", "grade": float(i), "finished": i > 0} for i in range(3)]
    record["samples"] = [{"prompt": f"prompt number {i}", "answers": {"ppo": many}} for i in range(15)]
    write_json(Path(full_run.evaluate_dir) / "evaluation.json", record)
    page = Page(render_report(full_run))
    assert page.text.count("prompt number") == page.tags.count("article") == MAX_PROMPTS
    assert page.text.count("cut off") == MAX_PROMPTS
    assert "2 more answers" in page.text


def test_stage_writes_both_files_whole(full_run, capsys):
    result = main(full_run)
    written = json.loads(Path(result.outputs["summary"]).read_text(encoding="utf-8"))
    assert written == result.summary == build_summary(full_run)
    assert Path(result.outputs["report"]).read_text(encoding="utf-8") == render_report(full_run)
    assert sorted(p.name for p in Path(full_run.run_dir).iterdir()) == ["report.html", "summary.json"]
    assert result.outputs["report"] in capsys.readouterr().out


def test_stage_writes_nothing_after_an_error(tmp_path):
    with pytest.raises(DataError):
        main(config(tmp_path))
    assert not (tmp_path / "report").exists()


def alarms(cfg: ReportStage) -> list[str]:
    return [note.alarm for note in health_notes(read_run(cfg)) if not note.ok]


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"eos_frac": 0.89}, "Many answers are cut off"),
        ({"distinct_2": 0.58}, "Answers repeat the same phrases"),
        ({"length_mean": 80.0}, "Answer length has drifted"),
        ({"gold_score": -10.0}, "The reward rose while the gold score fell"),
    ],
)
def test_health_of_the_candidate(full_run, changes, alarm):
    record = evaluation()
    record["policies"]["ppo"].update(changes)
    write_json(Path(full_run.evaluate_dir) / "evaluation.json", record)
    assert alarms(full_run) == [alarm]
    assert alarm in Page(render_report(full_run)).text


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"objective/kl": 12.5}, "KL is far above its target"),
        ({"objective/kl": -0.2}, "KL is negative"),
        ({"val/explained_var": -0.3}, "The critic is worse than a constant"),
        ({"policy/clipfrac_avg": 0.4}, "Too many tokens are clipped"),
        ({"loss/policy_avg": None}, "Some losses were not finite"),
    ],
)
def test_health_of_the_curves(full_run, changes, alarm):
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", [ppo_row(i, **changes) for i in range(1, 41)])
    assert alarms(full_run) == [alarm]


def test_a_kl_that_rises_from_0_in_a_bend_is_not_negative(full_run):
    kl = [0.0, 0.16, 0.43, 1.59, 2.65, 2.93, 3.5, 4.79, 4.85, 6.33, 7.32, 8.69]
    rows = [ppo_row(i, **{"objective/kl": y}) for i, y in enumerate(kl, 1)]
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", rows)
    assert "KL is negative" not in alarms(full_run)


def test_health_of_falling_entropy_and_of_the_reward_model(full_run):
    rows = [ppo_row(i, **{"policy/entropy_avg": 2.5 / i}) for i in range(1, 41)]
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", rows)
    summary = {"accuracy": 0.52, "accuracy_low": 0.46, "accuracy_high": 0.58, "length_correlation": -0.6}
    write_json(Path(full_run.reward_dir) / "result.json", {"summary": summary})
    assert sorted(alarms(full_run)) == [
        "Entropy collapses",
        "The reward follows length",
        "The reward model is no better than a coin",
    ]


def test_a_healthy_run_passes_every_check_and_one_noisy_batch_is_no_alarm(full_run):
    names = {note.name for note in health_notes(read_run(full_run))}
    checks = {"gold", "reward_model", "reward_model_length", "eos", "distinct", "length", "finite"}
    assert names == checks | {"kl_high", "kl_negative", "entropy", "critic", "clip"}
    assert alarms(full_run) == []
    rows = [ppo_row(i, **({"objective/kl": -0.3} if i == 3 else {})) for i in range(1, 41)]
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", rows)
    assert alarms(full_run) == []


def guard_note(name: str, **changes) -> dict:
    words = {"title": f"{name} fine", "alarm": f"{name} alarm", "cause": "Why.", "next_step": "Lower `optim.lr`."}
    return {"name": name, "ok": True, "measured": "It is 1", "since": None, "earlier": [], **words, **changes}


def test_what_the_guards_said_stands_in_the_report_and_metrics_are_not_judged_again(full_run):
    write_lines(Path(full_run.ppo_dir) / "metrics.jsonl", [ppo_row(i, **{"objective/kl": -9}) for i in range(1, 41)])
    notes = [guard_note("sampler", ok=False, since=12, earlier=[[3, 7]]), guard_note("duplicates", earlier=[[5, 9]])]
    write_json(Path(full_run.ppo_dir) / "health.json", {"status": "alarm", "step": 40, "notes": notes})
    assert alarms(full_run) == ["sampler alarm"]
    assert build_summary(full_run)["warnings"] == ["sampler alarm"]
    page = Page(render_report(full_run)).text
    assert "It is 1. Since step 12. An alarm from step 3 to 7 is over. Likely cause. Why." in page
    assert "duplicates fine It is 1. An alarm from step 5 to 9 is over." in page


def test_of_a_guard_and_a_check_with_one_name_the_alarm_stands_else_the_check(full_run):
    for in_run, held_out, expected in [(True, 0.95, "95%"), (False, 0.95, "It is 1"), (False, 0.5, "50%")]:
        record = evaluation()
        record["policies"]["ppo"]["eos_frac"] = held_out
        write_json(Path(full_run.evaluate_dir) / "evaluation.json", record)
        notes = [guard_note("eos", ok=in_run, since=None if in_run else 3)]
        write_json(Path(full_run.ppo_dir) / "health.json", {"status": "ok", "step": 40, "notes": notes})
        (note,) = [note for note in health_notes(read_run(full_run)) if note.name == "eos"]
        assert note.measured.startswith(expected)
        assert note.ok == (in_run and held_out > 0.9)


@pytest.mark.parametrize("record", [{}, {"notes": 3}, {"notes": [{"name": "eos"}]}, {"notes": [["eos"]]}])
def test_a_malformed_health_file_is_named(full_run, record):
    write_json(Path(full_run.ppo_dir) / "health.json", record)
    with pytest.raises(DataError, match=r"health\.json is malformed"):
        render_report(full_run)


def test_fixed_kl_has_no_target(full_run):
    (Path(full_run.ppo_dir) / "config.yaml").write_text("kl: {kind: fixed, target: 6.0}\n", encoding="utf-8")
    run = read_run(full_run)
    assert run.kl_target is None
    assert "target 6" not in Page(render_report(full_run)).text


def test_metrics_of_a_resumed_and_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 9}\n\n{"step": 2, "a": 2, "b": NaN}\n{"step": 3, "a"', "utf-8"
    )
    metrics = read_metrics(path)
    assert metrics.series["a"] == [(1.0, 1.0), (2.0, 2.0)]
    assert metrics.series["b"] == []
    assert metrics.not_finite == {"a": 0, "b": 1}
    path.write_text('{"step": 1\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0, 2.5, 5, 7.5, 10]),
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (-0.45, 0.72, [-0.5, 0, 0.5, 1]),
        (5.0, 5.0, [4.5, 4.75, 5, 5.25, 5.5]),
        (1e-6, 4e-6, [1e-6, 2e-6, 3e-6, 4e-6]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert charts.nice_ticks(low, high) == pytest.approx(expected, rel=1e-6)


def test_ticks_cover_the_range():
    for low, high in [(-3.7, 12.1), (0.101, 0.1013), (1e5, 3e8), (-2e-7, -1e-7)]:
        ticks = charts.nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 8


def test_smoothing_is_exact_on_a_line_and_averages_noise():
    line = [3.0 - 0.5 * i for i in range(30)]
    assert charts.smooth(line) == pytest.approx(line)
    assert charts.smooth([4.0]) == [4.0]
    assert charts.smooth([1.0, 5.0, 2.0], span=1) == [1.0, 5.0, 2.0]
    wiggle = [(-1.0) ** i for i in range(60)]
    assert max(abs(y) for y in charts.smooth(wiggle)[10:50]) < 0.1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.04213, "0.0421"),
        (5.9, "5.9"),
        (13.64, "13.6"),
        (1240.4, "1,240"),
        (3e-6, "3.0e-06"),
        (-0.5, "\u22120.5"),
        (-3e-6, "\u22123.0e-06"),
    ],
)
def test_number(value, text):
    assert charts.number(value) == text


def test_fixed_lines_up_and_never_hides_a_small_value():
    assert charts.fixed(13.0, 1) == "13.0"
    assert charts.fixed(-8.1, 2) == "\u22128.10"
    assert charts.fixed(0.0, 1) == "0.0"
    assert charts.fixed(0.004, 1) == "0.004"


def test_chart_keeps_the_last_point_escapes_and_skips_the_empty():
    points = [(float(i), float(i % 7)) for i in range(1001)]
    series = [charts.Series("<s>", points), charts.Series("none", [])]
    svg = charts.line_chart(series, title='"t"', unit="nats")
    assert "<s>" not in svg
    assert "&lt;s&gt;, step 1,000: 6 nats" in svg
    assert svg.count("<circle") <= 160
    assert charts.line_chart([charts.Series("none", [])], title="t") == ""
    assert charts.interval_chart([], title="t") == ""


def test_clean_and_inline_code():
    assert clean("a\x00b\r\nc\td\u202e") == "a\ufffdb\nc\td\ufffd"
    assert inline_code("set `a<b` & go") == "set <code>a&lt;b</code> &amp; go"


def test_every_round_is_a_dot_in_their_order() -> None:
    """SFT, round 1, round 2, with less KL in the last: the path goes back."""
    rows = [{"kl": kl, "gold_score": gold} for kl, gold in ((0.0, 1.0), (4.0, 3.0), (2.0, 2.0), (None, 2.0))]
    chart = gold_chart(rows)
    across = [float(x) for x in re.findall(r'<circle class="mark[^"]*" cx="([\d.]+)"', chart)]
    assert len(across) == 3
    assert across[0] < across[2] < across[1]
    assert gold_chart([]) == ""
