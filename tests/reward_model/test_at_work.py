"""`rlhf reward eval` and `rlhf rollouts score`: our reward models and others', on files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from reward_model import evaluate, score_rollouts, train
from reward_model.model import RewardModel
from rlhf.cli import app
from rlhf.config_reward import RewardEval, RolloutsScore
from rlhf.data.templates import prompt_tokens, response_tokens
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.types import Rollout, StopReason

TOPICS = "star light moon sea sky blue red water cloud wind tree leaf bird fish good bad".split()  # noqa: SIM905
GOOD, POOR = "the sun is hot", "rain and rain and rain"


@pytest.fixture
def pairs(jsonl: Any) -> str:
    return jsonl("pairs.jsonl", [{"prompt": f"explain {w}", "chosen": GOOD, "rejected": POOR} for w in TOPICS])


@pytest.fixture
def foreign(tiny: Any, tmp_path: Path) -> str:
    """A reward model as others publish it: weights, configuration, tokenizer; pad == eos, no normalisation."""
    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny.tokenizer), num_labels=1, pad_token_id=tiny.eos, **shape)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "foreign")
    tiny.tokenizer.save_pretrained(tmp_path / "foreign")
    return str(tmp_path / "foreign")


def run_eval(model: str, *files: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    cfg = RewardEval(model=model, files=list(files), run_dir=str(tmp_path / "out"), precision="fp32", **changes)
    evaluate.main(cfg)
    return json.loads((tmp_path / "out" / "reward_report.json").read_text())


# --- rlhf reward eval -----------------------------------------------------------------------------------------


def test_a_model_of_others_scores_here_as_in_transformers(foreign: str, tiny: Any, runtime: Any) -> None:
    """With pad == eos transformers reads the score before the EOS, and so others trained the head; alone and padded."""
    rows = [
        prompt_tokens(tiny.tokenizer, "why", chat=True) + response_tokens(tiny.tokenizer, a, finished=True)
        for a in (GOOD, POOR)
    ]
    assert [row[-1] for row in rows] == [tiny.eos] * 2
    rows += [rows[0][:-1], rows[1][:3]]  # cut off before the EOS, and far before it
    model: Any = LlamaForSequenceClassification.from_pretrained(foreign)
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in rows]
    scorer = RewardModel.load(foreign, runtime, tokenizer=tiny.tokenizer)
    assert scorer.score_tokens(rows) == pytest.approx(expected, abs=1e-5)
    assert scorer.score_tokens(rows[1:2]) == pytest.approx(expected[1:2], abs=1e-5)
    assert expected[0] == pytest.approx(expected[2], abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_it_is_measured_by_its_own_tokenizer_and_template(
    foreign: str, tiny: Any, runtime: Any, pairs: str, tmp_path: Path
) -> None:
    report = run_eval(foreign, pairs, tmp_path=tmp_path)
    scorer = RewardModel.load(foreign, runtime, tokenizer=tiny.tokenizer)
    wins = 0
    for topic in TOPICS:
        start = prompt_tokens(tiny.tokenizer, f"explain {topic}", chat=True)
        good, poor = scorer.score_tokens(
            [start + response_tokens(tiny.tokenizer, a, finished=True) for a in (GOOD, POOR)]
        )
        wins += good > poor
    assert report["accuracy"]["value"] == pytest.approx(wins / len(TOPICS))
    assert report["length"]["longer_wins_in_labels"]["value"] == 0.0
    assert (report["prompts"], report["responses"], report["members"]) == (16, 32, 1)
    assert "<svg" in (tmp_path / "out" / "reward_report.html").read_text()


@pytest.mark.parametrize("folder", ["final", "adapter"])
def test_what_training_measured_comes_back(stage_config: Any, pairs: str, tmp_path: Path, folder: str) -> None:
    """By the model's folder, and by its adapter's."""
    tuning = {"tuning": {"kind": "lora", "rank": 4}, "optim": {"lr": 2e-2}}
    cfg = stage_config("reward", dataset={"path": pairs}, eval_dataset={"path": pairs}, epochs=2, **tuning)
    trained = train.main(cfg, RunOptions()).summary
    report = run_eval(f"{cfg.run_dir}/{folder}", pairs, tmp_path=tmp_path, max_length=cfg.max_length)
    assert report["accuracy"]["value"] == trained["label_accuracy"]
    assert report["calibration"]["log_loss"] == pytest.approx(trained["log_loss"], rel=1e-3)
    assert report["calibration"]["brier"] == pytest.approx(trained["brier"], rel=1e-3, abs=1e-6)


def test_several_files_have_a_row_each_and_one_together(
    foreign: str, pairs: str, jsonl: Any, tmp_path: Path, capsys: Any
) -> None:
    other = jsonl("ranked.jsonl", [{"prompt": "why", "responses": [POOR, GOOD, "it"], "ranks": [1, 2, 2]}])
    report = run_eval(foreign, pairs, other, tmp_path=tmp_path)
    assert report["accuracy"]["pairs"] == 16 + 2
    assert {Path(file).name: s["pairs"] for file, s in report["files"].items()} == {
        "pairs.jsonl": 16,
        "ranked.jsonl": 2,
    }
    shown = capsys.readouterr().out
    assert "ranked.jsonl: format ranking, 1 rows" in shown
    rows = [line.split()[:2] for line in shown.splitlines()]
    assert all(row in rows for row in (["pairs.jsonl", "16"], ["ranked.jsonl", "2"], ["all", "18"]))


def test_long_rows_are_cut_as_in_training_and_counted(foreign: str, pairs: str, tmp_path: Path, capsys: Any) -> None:
    run_eval(foreign, pairs, tmp_path=tmp_path, max_length=10)
    assert "responses longer than 10 tokens keep their end" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"pairs\.jsonl:1, response \d: \d+ tokens, max_length is 10"):
        run_eval(foreign, pairs, tmp_path=tmp_path, max_length=10, truncation="error")


def test_ratings_are_refused_with_words_that_fit(foreign: str, jsonl: Any, tmp_path: Path) -> None:
    ratings = jsonl("ratings.jsonl", [{"prompt": "why", "response": GOOD, "rating": 4}])
    with pytest.raises(DataError, match="no preferences can be read from rows of format 'rating'") as caught:
        run_eval(foreign, ratings, tmp_path=tmp_path)
    assert "give comparisons" in caught.value.fix, "there is no loss to set"


def test_a_language_model_and_an_aggregate_of_one_are_refused(
    tiny: Any, foreign: str, pairs: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no trained `score` head"):
        run_eval(tiny.path, pairs, tmp_path=tmp_path)
    with pytest.raises(ConfigError, match="the reward model is a single one"):
        run_eval(foreign, pairs, tmp_path=tmp_path, aggregate="min")
    assert not (tmp_path / "out").exists()


# --- rlhf rollouts score --------------------------------------------------------------------------------------


@pytest.fixture
def buffer(tiny: Any, tmp_path: Path) -> str:
    """Two finished answers, and one cut off by the budget."""
    rows = []
    for topic, text, stop in (
        ("sun", GOOD, StopReason.EOS),
        ("sea", POOR, StopReason.LENGTH),
        ("sky", "it", StopReason.EOS),
    ):
        prompt = prompt_tokens(tiny.tokenizer, f"explain {topic}", chat=True)
        response = response_tokens(tiny.tokenizer, text, finished=stop is StopReason.EOS)
        mask = [False] * len(prompt) + [True] * len(response)
        rows.append(
            Rollout(f"explain {topic}", text, prompt + response, mask, [-0.5] * len(mask), stop, "p", score=9.0)
        )
    path = tmp_path / "rollouts.parquet"
    RolloutBuffer(rows).to_parquet(path)
    return str(path)


def run_score(model: str, rollouts: str, **changes: Any) -> list[Rollout]:
    score_rollouts.main(RolloutsScore(model=model, rollouts=rollouts, precision="fp32", **changes))
    return RolloutBuffer.from_parquet(changes.get("out") or rollouts).rollouts


def test_scores_replace_scores_and_nothing_else(tiny: Any, buffer: str, runtime: Any, tmp_path: Path) -> None:
    before = RolloutBuffer.from_parquet(buffer).rollouts
    out = str(tmp_path / "deep" / "scored.parquet")
    after = run_score(tiny.reward, buffer, out=out)
    model = RewardModel.load(tiny.reward, runtime, tokenizer=tiny.tokenizer)
    assert [r.score for r in after] == pytest.approx(model.score_tokens([r.tokens for r in before]), abs=1e-6)
    assert len({r.score for r in after}) == 3
    for rollout in after:
        rollout.score = 9.0
    assert after == before
    assert [r.score for r in RolloutBuffer.from_parquet(buffer).rollouts] == [9.0] * 3, "--out leaves the file alone"
    assert [r.score for r in run_score(tiny.reward, buffer)] != [9.0] * 3


def test_an_ensemble_writes_its_disagreement(
    stage_config: Any, pairs: str, buffer: str, tiny: Any, runtime: Any
) -> None:
    cfg = stage_config("reward", dataset={"path": pairs}, ensemble={"members": 3}, epochs=1)
    model = train.main(cfg, RunOptions()).outputs["reward_model"]
    found = run_score(model, buffer, aggregate="min")
    scores = (
        RewardModel.load(model, runtime, tokenizer=tiny.tokenizer).score_members([r.tokens for r in found]).T.tolist()
    )
    assert [r.score for r in found] == pytest.approx([min(row) for row in scores], abs=1e-5)
    assert [r.score_std for r in found] == pytest.approx([pstdev(row) for row in scores], abs=1e-5)
    assert run_score(tiny.reward, buffer)[0].score_std is None, "a single model's score has none"


@pytest.fixture
def other_tokens(foreign: str, tiny: Any) -> str:
    """A reward model whose tokenizer numbers two words the other way round."""
    file = Path(foreign) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["sun"], vocabulary["rain"] = vocabulary["rain"], vocabulary["sun"]
    file.write_text(json.dumps(content))
    return foreign


def test_tokens_that_mean_something_else_are_refused_or_made_anew(other_tokens: str, buffer: str, tiny: Any) -> None:
    """The third text has neither word, so two rollouts are at fault; made anew, it alone has the tokens it had."""
    before = Path(buffer).read_bytes()
    with pytest.raises(DataError, match=r"2 of 3 rollouts \(1, 2\) have tokens that .* reads as another text"):
        run_score(other_tokens, buffer)
    assert Path(buffer).read_bytes() == before
    anew = run_score(other_tokens, buffer, retokenize=True)
    vocabulary = tiny.tokenizer.get_vocab()
    swapped = {vocabulary["sun"]: vocabulary["rain"], vocabulary["rain"]: vocabulary["sun"]}
    rows = [[swapped.get(token, token) for token in rollout.tokens] for rollout in anew]
    model: Any = LlamaForSequenceClassification.from_pretrained(other_tokens)
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in rows]
    assert [r.score for r in anew] == pytest.approx(expected, abs=1e-5)


def test_a_stop_string_may_stand_in_the_tokens_alone(tiny: Any, buffer: str) -> None:
    rollouts = RolloutBuffer.from_parquet(buffer)
    rollouts.rollouts[0].response, rollouts.rollouts[0].stop = "the sun is", StopReason.STOP
    rollouts.to_parquet(buffer)
    assert run_score(tiny.reward, buffer)[0].score != 9.0
    rollouts.rollouts[0].stop = StopReason.EOS
    rollouts.to_parquet(buffer)
    with pytest.raises(DataError, match="1 of 3 rollouts"):
        run_score(tiny.reward, buffer)


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def rlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *words: CliRunner().invoke(app, list(words))


def test_files_and_settings_stand_on_one_line(rlhf: Any, foreign: str, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "a=b.jsonl").write_text(Path(pairs).read_text())
    done = rlhf("reward", "eval", foreign, pairs, "a=b.jsonl", "precision=fp32", "limit=4")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "runs" / "reward_eval" / "reward_report.json").read_text())
    assert {file: s["pairs"] for file, s in report["files"].items()} == {pairs: 4, "a=b.jsonl": 4}


def test_scores_are_written_from_the_command_line(rlhf: Any, tiny: Any, buffer: str) -> None:
    done = rlhf("rollouts", "score", tiny.reward, buffer, "--out", "s.parquet", "precision=fp32")
    assert done.exit_code == 0, done.output
    assert "3 scores by" in done.output
    assert "the tokens that were sampled" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward", "eval", "MODEL", "a.jsonl", "max_lenght=3"], "did you mean 'max_length'?"),
        (["reward", "eval", "MODEL", "limit=3"], "files: "),
        (["reward", "eval", "MODEL", "none.jsonl"], "none.jsonl"),
        (["rollouts", "score", "MODEL", "none.parquet"], "no rollouts at none.parquet"),
        (["rollouts", "score", "MODEL", "BUFFER", "aggregate=best"], "aggregate: "),
    ],
)
def test_mistakes_are_told_in_a_panel(rlhf: Any, foreign: str, buffer: str, words: list[str], said: str) -> None:
    done = rlhf(*[{"MODEL": foreign, "BUFFER": buffer}.get(word, word) for word in words])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "fix: " in done.stderr
