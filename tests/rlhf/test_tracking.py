"""metrics.jsonl is the truth with W&B, without it and when it breaks; offline runs hold the same numbers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config_schema import TrackingConfig
from rlhf.tracking import REDACTED, Tracker, redact

OFF = TrackingConfig(wandb="off")
AUTO = TrackingConfig()


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in, whatever the machine's user is."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def opened(run_dir: Path, cfg: TrackingConfig = OFF, **options: Any) -> tuple[Tracker, list[str]]:
    said: list[str] = []
    options = {"stage": "ppo", "config": {"lr": 1e-6}} | options
    return Tracker.open(run_dir, cfg, say=said.append, **options), said


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(n: int) -> list[dict[str, float]]:
    """Numbers that no rounding keeps."""
    return [{"reward": (-7.42 + i) / 3, "kl": 0.1 * i**2, "tokens": 2**53 - i} for i in range(n)]


def wandb_history(run_dir: Path) -> list[dict[str, Any]]:
    """The history rows of the newest offline run, read back from its file by W&B's own reader."""
    files = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(newest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if "No such command" in done.stderr:
        pytest.skip("this wandb cannot inspect offline runs")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def test_metrics_are_exact_lines_and_not_finite_is_null(tmp_path: Path) -> None:
    tracker, said = opened(tmp_path / "run")
    with tracker:
        for step, metrics in enumerate(curve(3)):
            tracker.log(step, metrics)
            assert len(rows(tmp_path / "run" / "metrics.jsonl")) == step + 1, "flushed line by line"
        tracker.log(3, {"nan": float("nan"), "inf": float("-inf"), "tensor": torch.tensor(0.5), "n": 3})
    lines = rows(tmp_path / "run" / "metrics.jsonl")
    assert lines[:3] == [{"step": i, **metrics} for i, metrics in enumerate(curve(3))]
    assert lines[3] == {"step": 3, "nan": None, "inf": None, "tensor": 0.5, "n": 3}
    assert type(lines[3]["n"]) is int
    assert said == [f"tracking: {tmp_path / 'run' / 'metrics.jsonl'}; W&B is off"]


def test_wrong_metrics_are_errors(tmp_path: Path) -> None:
    tracker, _ = opened(tmp_path)
    with pytest.raises(ValueError, match="named 'step'"):
        tracker.log(1, {"step": 2.0})
    with pytest.raises(TypeError, match="'high', not a number"):
        tracker.log(1, {"reward": "high"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="another step than 1"):
        tracker.samples(1, [{"step": 2}])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_samples_and_summary(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Erklär das"}]
    with opened(tmp_path)[0] as tracker:
        tracker.samples(
            4, [{"prompt": chat, "response": "a\nb", "score": float("nan")}, {"prompt": "x", "extra": (1,)}]
        )
        tracker.samples(5, [])
        tracker.summary({"reward": torch.tensor(0.25), "model": Path("final")})
        tracker.summary({"kl": 3.0, "worst": float("-inf")})
    assert rows(tmp_path / "samples.jsonl") == [
        {"step": 4, "prompt": chat, "response": "a\nb", "score": None},
        {"step": 4, "prompt": "x", "extra": [1]},
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"reward": 0.25, "model": "final", "kl": 3.0, "worst": None}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker, said = opened(tmp_path / "run", AUTO, enabled=False)
    with tracker:
        tracker.log(1, {"reward": 1.0})
        tracker.samples(1, [{"prompt": "x"}])
        tracker.summary({"reward": 1.0})
        tracker.truncate_after(0)
    assert said == []
    assert not (tmp_path / "run").exists()


def test_a_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    with opened(tmp_path)[0] as tracker:
        for step in range(6):
            tracker.log(step, {"reward": step / 7})
            tracker.samples(step, [{"prompt": "p", "response": "r"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "prompt": "\xc3')
    with opened(tmp_path, resume_step=3)[0] as tracker:
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
        assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
        tracker.log(4, {"reward": 4 / 7})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": i, "reward": i / 7} for i in range(5)]


def test_a_whole_line_without_its_end_counts_as_torn(tmp_path: Path) -> None:
    torn = '{"step": 2, "kl": 12}'  # was to end in .5
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kl": 12.0}\n' + torn)
    with opened(tmp_path, resume_step=2)[0] as tracker:
        tracker.log(3, {"kl": 1.0})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_fresh_start_has_no_lines_of_an_earlier_attempt(tmp_path: Path) -> None:
    for _ in range(2):
        with opened(tmp_path)[0] as tracker:
            tracker.log(0, {"reward": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0, "reward": 1.0}]


@pytest.fixture
def earlier(tmp_path: Path) -> dict[str, bytes]:
    """A finished run's files in the test's folder."""
    with opened(tmp_path)[0] as tracker:
        tracker.log(1, {"reward": 1.0})
        tracker.samples(1, [{"prompt": "p"}])
        tracker.summary({"reward": 1.0, "stale": 2.0})
    (tmp_path / "result.json").write_text("{}")
    return {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_fresh_start_that_writes_nothing_loses_nothing(tmp_path: Path, earlier: dict[str, bytes]) -> None:
    """As when the data set that is read next is refused."""
    with pytest.raises(KeyError, match="stop"):
        crash(opened(tmp_path)[0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


@pytest.mark.parametrize("first", ["log", "samples", "summary", "close"])
def test_the_first_thing_written_drops_all_of_the_earlier_attempt(tmp_path: Path, earlier: Any, first: str) -> None:
    """`close`: a stage that ends well has written all that it had."""
    assert len(earlier) == 4
    writes = {
        "log": lambda tracker: tracker.log(1, {"reward": 3.0}),
        "samples": lambda tracker: tracker.samples(1, [{"prompt": "q"}]),
        "summary": lambda tracker: tracker.summary({"reward": 3.0}),
        "close": lambda tracker: tracker.close(),
    }
    tracker, _ = opened(tmp_path)
    writes[first](tracker)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    name = {"log": "metrics.jsonl", "samples": "samples.jsonl", "summary": "summary.json"}.get(first)
    assert left.keys() == {name} - {None}
    assert "stale" not in left.get("summary.json", "")
    tracker.log(2, {"reward": 4.0})
    assert rows(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "reward": 4.0}


def test_a_resume_goes_on_with_the_summary_and_drops_the_old_result(tmp_path: Path, earlier: Any) -> None:
    with opened(tmp_path, resume_step=1)[0] as tracker:
        assert (tmp_path / "result.json").exists()
        tracker.log(2, {"reward": 3.0})
        assert not (tmp_path / "result.json").exists(), "the stage is not done"
        tracker.summary({"reward": 3.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"reward": 3.0, "stale": 2.0}


def test_a_fresh_start_replays_nothing_of_the_earlier_attempt(
    tmp_path: Path, earlier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = fake_wandb(monkeypatch, key="k")
    with opened(tmp_path, AUTO)[0] as tracker:
        tracker.log(1, {"reward": 5.0})
    assert run.rows == [{"step": 1, "reward": 5.0}]


def test_without_wandb_json_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker, said = opened(tmp_path, AUTO)
    with tracker:
        tracker.log(1, {"reward": 0.5})
        tracker.samples(1, [{"prompt": "p", "response": "r", "score": 1.0}])
    assert len(said) == 1
    assert "W&B is not available (ModuleNotFoundError" in said[0]
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]
    assert not (tmp_path / "wandb").exists()


def test_wandb_is_imported_only_when_wanted(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf.tracking import Tracker; from rlhf.config_schema import TrackingConfig as C\n"
        f"Tracker.open({str(tmp_path)!r}, C(wandb='off'), stage='sft', config={{}}).log(1, {{'x': 1.0}})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_an_offline_run_holds_every_value_also_after_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    values = curve(12)
    tracker, said = opened(run_dir, AUTO)
    with tracker:
        for step, metrics in enumerate(values[:9]):
            tracker.log(step, metrics)
            tracker.samples(step, [{"prompt": "p", "response": f"r{step}", "score": step / 3}] * 9)
        tracker.log(9, {"reward": float("nan"), "kl": 1.5})
        tracker.summary({"final_reward": 0.125})
    assert len(said) == 1
    assert "W&B offline; not logged in; upload with: wandb sync " in said[0]
    compare(run_dir, expected=10)
    first_id = (run_dir / "wandb" / "run_id").read_text()

    time.sleep(1.1)  # W&B names the folder of an offline run by the second
    with opened(run_dir, AUTO, resume_step=4)[0] as tracker:
        for step, metrics in enumerate(values[5:], start=5):
            tracker.log(step, metrics)
    compare(run_dir, expected=12)
    assert (run_dir / "wandb" / "run_id").read_text() == first_id
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2
    assert (run_dir / "wandb" / "data").is_dir(), "tables are staged inside the run"
    assert "WANDB_DATA_DIR" not in os.environ
    assert capfd.readouterr() == ("", ""), "W&B is silent"


def compare(run_dir: Path, expected: int) -> None:
    """Reward, KL and token curves of the newest W&B run equal metrics.jsonl, value by value."""
    ours, history = rows(run_dir / "metrics.jsonl"), wandb_history(run_dir)
    assert len(ours) == len(history) == expected
    for mine, theirs in zip(ours, history, strict=True):
        assert theirs["_step"] == theirs["step"] == mine["step"]
        for name in ("reward", "kl", "tokens"):
            assert theirs.get(name) == mine.get(name), f"{name} at step {mine['step']}"


@pytest.mark.parametrize(("mode", "setting", "word"), [
    ("disabled", "auto", "W&B is off"),
    ("offline", "online", "W&B offline; upload"),
    ("online", "off", "W&B is off"),
])  # fmt: skip
def test_the_environment_wins_over_all_but_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
    setting: Any,
    word: str,
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker, said = opened(tmp_path, TrackingConfig(wandb=setting))
    tracker.close()
    assert word in said[0]
    assert capfd.readouterr() == ("", ""), "W&B is silent"


class FakeRun:
    """A W&B run that fails when told to."""

    step, url, dir = 0, "https://wandb.test/run", "wandb/run-1/files"

    def __init__(self, broken: str) -> None:
        self.broken, self.rows, self.summary, self.exit_code = broken, [], {}, None

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, Any], step: int) -> None:
        if self.broken == "log" and step == 2:
            raise ConnectionError("service died")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.broken == "finish":
            raise TimeoutError("too slow")


def fake_wandb(
    monkeypatch: pytest.MonkeyPatch, *, key: str | None, broken: str = ""
) -> tuple[FakeRun, list[dict[str, Any]]]:
    run, calls = FakeRun(broken), []

    def init(**options: Any) -> FakeRun:
        calls.append(options)
        if broken == "init" or broken == f"init {options['mode']}":
            raise TimeoutError("no answer after 20 s\nand a second line")
        return run

    class Settings(types.SimpleNamespace):
        model_fields = {"silent": 0, "init_timeout": 0}

    settings = types.SimpleNamespace(api_key=key, base_url="https://api.wandb.ai")
    module = types.ModuleType("wandb")
    module.init, module.Settings, module.Table = init, Settings, dict  # type: ignore[attr-defined]
    module.setup = lambda _: types.SimpleNamespace(settings=settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run, calls


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_is_said_once_and_json_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    fake_wandb(monkeypatch, key="k", broken=broken)
    tracker, said = opened(tmp_path, AUTO)
    with tracker:
        for step in range(5):
            tracker.log(step, {"reward": step / 3})
            tracker.samples(step, [{"prompt": "p", "response": "r"}])
        tracker.summary({"reward": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": i, "reward": i / 3} for i in range(5)]
    failures = [line for line in said if "did not start" in line or "failed" in line]
    assert len(failures) == 1
    assert "second line" not in failures[0]
    assert "WANDB_DATA_DIR" not in os.environ


def test_without_network_online_becomes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = fake_wandb(monkeypatch, key="k", broken="init online")
    tracker, said = opened(tmp_path, AUTO)
    tracker.log(0, {"reward": 1.0})
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert "W&B offline; online: TimeoutError: no answer after 20 s; upload with" in said[0]
    assert run.rows == [{"step": 0, "reward": 1.0}]
    tracker.close()


TRACKED = """
import sys
from pathlib import Path
from rlhf.config_schema import TrackingConfig
from rlhf.tracking import Tracker
with Tracker.open(Path(sys.argv[1]), TrackingConfig(), stage="ppo", config={}) as tracker:
    for step in range(20):
        tracker.log(step, {"reward": step / 3})
        tracker.samples(step, [{"prompt": "p", "response": "r", "score": 1.0}])
    tracker.summary({"reward": 1.0})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("listens", "reason"), [(False, "connection refused"), (True, "Timed out initializing run")])
def test_a_server_that_cannot_be_reached_or_is_silent(tmp_path: Path, listens: bool, reason: str) -> None:
    """W&B itself, logged in: it is asked once at the start, with a limit, and the run goes on offline."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()  # connections are taken up, nothing is ever answered
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
            "HOME": str(tmp_path),
        }
        command = [sys.executable, "-c", TRACKED, str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 1
    assert "W&B offline; online: CommError" in said[0]
    assert reason in said[0]
    assert rows(tmp_path / "run" / "metrics.jsonl") == [{"step": i, "reward": i / 3} for i in range(20)]
    assert [row["reward"] for row in wandb_history(tmp_path / "run") if "reward" in row] == [i / 3 for i in range(20)]


@pytest.mark.parametrize("source", ["settings", "netrc", "nothing"])
def test_online_only_when_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    _, calls = fake_wandb(monkeypatch, key="k" if source == "settings" else None)
    if source == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    _, said = opened(tmp_path, TrackingConfig(wandb="online"))
    assert calls[0]["mode"] == ("offline" if source == "nothing" else "online")
    assert ("not logged in" in said[0]) == (source == "nothing")
    assert calls[0]["settings"].init_timeout > 0
    assert not hasattr(calls[0]["settings"], "finish_timeout"), "settings that a version lacks are left out"


def test_an_online_resume_logs_what_the_server_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = fake_wandb(monkeypatch, key="k")
    with opened(tmp_path, AUTO)[0] as tracker:
        for step in range(6):
            tracker.log(step, {"kl": float(step)})
    run.step, run.rows = 3, []  # it lost steps 3 to 5
    opened(tmp_path, AUTO, resume_step=4)
    assert run.rows == [{"step": 3, "kl": 3.0}, {"step": 4, "kl": 4.0}]
    assert [call["resume"] for call in calls] == [None, "allow"]
    opened(tmp_path, AUTO)
    assert calls[0]["id"] == calls[1]["id"] != calls[2]["id"], "kept over a resume, new on a fresh start"


def crash(tracker: Tracker) -> None:
    with tracker:
        raise KeyError("stop")


def test_a_crashed_stage_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = fake_wandb(monkeypatch, key="k")
    with pytest.raises(KeyError, match="stop"):
        crash(opened(tmp_path, AUTO)[0])
    assert run.exit_code == 1


def test_secrets_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "very-secret-value")
    kept = {
        "max_new_tokens": 64,
        "eos_token": "</s>",
        "tokenizer": "gpt2",
        "monkey": "m",
        "token": None,
        "lr": 1e-6,
    }
    hidden = {"hf_token": "hf_x", "apiKey": "k", "client-secret": "s", "WANDB_API_KEY": "w", "password": 1234}
    config = {
        **kept,
        **hidden,
        "nested": [{"key": {"a": "b", "by_row": True}}],
        "url": "x/?k=very-secret-value",
    }
    redacted = {
        **kept,
        **dict.fromkeys(hidden, REDACTED),
        "nested": [{"key": {"a": REDACTED, "by_row": True}}],
    }
    assert redact(config) == {**redacted, "url": REDACTED}
    _, calls = fake_wandb(monkeypatch, key="k")
    tracker, _ = opened(tmp_path, AUTO, config=config)
    tracker.close()
    assert calls[0]["config"] == redact(config)
