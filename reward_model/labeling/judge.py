"""A judge model labels contests: every pair of responses, in both orders, batch by batch, controls among them.

Two orders of a pair, two verdicts. Both are turned into P(response i is better than j) and averaged; where they name
different responses the pair is a tie (1/2), and counted: the judge then followed the place and not the content. A
pair of which one order has no verdict has no label, and neither has its contest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from reward_model.labeling.agreement import TIE
from reward_model.labeling.judge_backend import UNASKED, Backend, Failure, NoVerdict
from reward_model.labeling.judge_controls import Control, controls_for
from reward_model.labeling.judge_ledger import Ledger
from reward_model.labeling.judge_prompt import CRITERIA, VERSION, Question, Verdict
from rlhf.config_judge import JudgeConfig
from rlhf.errors import JudgeError
from rlhf.progress import Progress
from rlhf.types import Prompt

FIRST_QUESTIONS = 20
"""Questions that are taken to have been asked before the share of failures means something."""

FIRST_CONTROLS = 10
"""The same of controls."""


@dataclass(frozen=True)
class Contest:
    """K responses to one prompt, to be compared pair by pair."""

    prompt: Prompt
    responses: tuple[str, ...]


@dataclass
class Pair:
    """Two responses and what was said of them: `shown` with the first as A, `swapped` with the second as A."""

    shown: Verdict | Failure
    swapped: Verdict | Failure

    @property
    def both(self) -> tuple[Verdict, Verdict] | None:
        """The verdicts, where there are two."""
        if isinstance(self.shown, Failure) or isinstance(self.swapped, Failure):
            return None
        return self.shown, self.swapped

    @property
    def label(self) -> float | None:
        """P(the first response is better); None without two verdicts."""
        return None if self.both is None else soft_label(*self.both)

    @property
    def contradicts(self) -> bool:
        """Whether the two orders name different responses, each the one in the same place."""
        return self.both is not None and (self.both[0].p_first - 0.5) * (self.both[1].p_first - 0.5) > 0


@dataclass
class Judged:
    """A contest with the pairs (i, j), i < j, of its responses."""

    contest: Contest
    pairs: dict[tuple[int, int], Pair]

    @property
    def labels(self) -> dict[tuple[int, int], float] | None:
        """P(response i is better than j) of every pair; None where one has no label."""
        found = {key: label for key, pair in self.pairs.items() if (label := pair.label) is not None}
        return found if len(found) == len(self.pairs) else None

    @property
    def unasked(self) -> bool:
        """Whether the budget ended before its end."""
        return any(UNASKED in (pair.shown, pair.swapped) for pair in self.pairs.values())


@dataclass
class Work:
    """All that was judged so far, for the report; `controls` hold the verdicts on pairs whose answer is known."""

    judged: list[Judged] = field(default_factory=list)
    controls: list[tuple[Control, Pair]] = field(default_factory=list)
    alarm: str = ""


def soft_label(shown: Verdict, swapped: Verdict) -> float:
    """P(the response that was first in `shown` is better): (p + 1 - q) / 2, and 1/2 where the orders contradict."""
    p, q = shown.p_first, swapped.p_first
    return 0.5 if (p - 0.5) * (q - 0.5) > 0 else (p + 1 - q) / 2


class Judge:
    """Asks a backend, and nothing twice.

    Args:
        cfg: whom and how.
        run_dir: where answers are kept.
        backend: the model; `open_judge` makes it from `cfg`.
        seed: of the controls.
    """

    def __init__(self, cfg: JudgeConfig, run_dir: str | Path, backend: Backend, seed: int) -> None:
        self.cfg, self._backend, self._seed = cfg, backend, seed
        self.ledger = Ledger(Path(run_dir), cfg.budget)
        self.before = self.ledger.spent()
        self.work = Work()
        self._said: dict[str, Verdict | Failure] = {}
        self.failures: Counter[str] = Counter()  # by kind, of questions about controls, too
        self.examples: dict[str, str] = {}  # of each kind the first one's detail

    def close(self) -> None:
        """Give the run folder free."""
        self.ledger.close()

    def batches(self, contests: Sequence[Contest], progress: Progress) -> Iterator[list[Judged]]:
        """The contests in their order, a batch at a time, each with a verdict per pair and order or why there is none.

        It ends early when the budget is used up; of its last batch, some contests are then `unasked`.

        Raises:
            JudgeError: too many questions stay without an answer, or too many controls fail. The batch is not yielded.
            ConfigError: the judge cannot be asked at all.
        """
        size, controls_cfg = self.cfg.batch_size, self.cfg.controls
        parts = [contests[start : start + size] for start in range(0, len(contests), size)]
        mixed_in = [controls_for(part, controls_cfg, seed=f"{self._seed}/{n}") for n, part in enumerate(parts)]
        total = sum(len(c.responses) * (len(c.responses) - 1) for c in contests) + 2 * sum(map(len, mixed_in))
        phase = progress.phase("judge", total=total, unit="comparisons")
        for batch, controls in zip(parts, mixed_in, strict=True):
            known = [Contest(control.prompt, (control.real, control.bad)) for control in controls]
            # Controls come first: where the budget ends within the batch, its labels were controlled all the same.
            answers = self._judge([*known, *batch], lambda n: phase.advance(n, failed=self.failures.total()))
            of_controls, judged = answers[: len(known)], answers[len(known) :]
            pairs = zip(controls, of_controls, strict=True)
            self.work.controls += [(control, one.pairs[0, 1]) for control, one in pairs if not one.unasked]
            self._check_controls()
            self.work.judged += judged
            yield judged
            if self.ledger.exhausted:
                return

    def _judge(self, contests: Sequence[Contest], advance: Callable[[int], None]) -> list[Judged]:
        """One batch: all of its questions at once."""
        questions, places = [], []
        for number, contest in enumerate(contests):
            for i, j in combinations(range(len(contest.responses)), 2):
                a, b = contest.responses[i], contest.responses[j]
                questions += [Question(contest.prompt, a, b), Question(contest.prompt, b, a)]
                places.append((number, i, j))
        said = self._ask(questions, advance)
        judged = [Judged(contest, {}) for contest in contests]
        for (number, i, j), shown, swapped in zip(places, said[::2], said[1::2], strict=True):
            judged[number].pairs[i, j] = Pair(shown, swapped)
        return judged

    def _ask(self, questions: Sequence[Question], advance: Callable[[int], None]) -> list[Verdict | Failure]:
        """What the judge says of each question; equal ones are asked once."""
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._said}
        for key in self._remembered([*missing]):
            del missing[key]
        advance(len(questions) - len(missing))
        todo, chunk = [*missing], self._backend.chunk
        with ThreadPoolExecutor(self._backend.parallel) as pool:
            try:
                parts: dict[Future[list[Any]], list[str]] = {}
                for start in range(0, len(todo), chunk):
                    part = todo[start : start + chunk]
                    asked = [missing[key] for key in part]
                    parts[pool.submit(self._backend.ask, asked, part, self.ledger)] = part
                for future in as_completed(parts):
                    for key, answer in zip(parts[future], future.result(), strict=True):
                        self._note(key, answer if isinstance(answer, Failure) else self._read(answer))
                    self._check_failures()
                    advance(len(parts[future]))
            except BaseException:
                self._backend.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._said[key] for key in keys]

    def _remembered(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` whose stored answer is taken.

        An answer without a verdict is one, too, unless such answers would stop the run before anything is asked: what
        failed them may be mended by now.
        """
        stored = {key: self._read(answer) for key in keys if (answer := self.ledger.answer(key)) is not None}
        failed = [key for key, outcome in stored.items() if isinstance(outcome, Failure)]
        if self._too_many(self.failures.total() + len(failed), len(self._said) + len(stored)):
            for key in failed:
                del stored[key]
        for key, outcome in stored.items():
            self._note(key, outcome)
        return [*stored]

    def _key(self, question: Question) -> str:
        """What a stored answer is found by: everything that it depends on."""
        asked = [question.prompt, question.first, question.second]
        content = [VERSION, self._backend.identity(), self.cfg.answer, self.cfg.criteria.strip() or CRITERIA, asked]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _read(self, answer: dict[str, Any]) -> Verdict | Failure:
        try:
            return self._backend.verdict(answer)
        except NoVerdict as none:
            return Failure(none.kind, str(none))

    def _note(self, key: str, outcome: Verdict | Failure) -> None:
        self._said[key] = outcome
        if isinstance(outcome, Failure) and outcome != UNASKED:
            self.failures[outcome.kind] += 1
            self.examples.setdefault(outcome.kind, outcome.detail)

    def _too_many(self, failed: int, asked: int) -> bool:
        return failed > self.cfg.max_failures * max(FIRST_QUESTIONS, asked)

    def _check_failures(self) -> None:
        """Stop where going on would only cost.

        Raises:
            JudgeError: the last failure is named in it.
        """
        asked, failed = len(self._said), self.failures.total()
        if self._too_many(failed, asked):
            last = next(f for f in reversed(self._said.values()) if isinstance(f, Failure) and f != UNASKED)
            raise JudgeError(
                f"the judge {self.cfg.model} left {failed} of {asked} questions without an answer "
                f"(allowed: {self.cfg.max_failures:.0%}); the last one: {last.kind}: {last.detail}",
                fix="mend the endpoint, the form of its answers (judge.answer) or judge.max_failures, and run the same "
                "command again: answers are kept",
            )

    def _check_controls(self) -> None:
        """Hold the judge to what everybody knows.

        Raises:
            JudgeError: too many controls failed, and the configuration says to stop.
        """
        labels = [label for _, pair in self.work.controls if (label := pair.label) is not None]
        failed, cfg = sum(label <= 0.5 + TIE for label in labels), self.cfg.controls
        self.work.alarm = ""
        if failed > cfg.max_failed * max(FIRST_CONTROLS, len(labels)):
            self.work.alarm = (
                f"the judge {self.cfg.model} preferred an empty, meaningless or cut response, or could not tell it "
                f"from a real one, in {failed} of {len(labels)} controls (allowed: {cfg.max_failed:.0%})"
            )
            if cfg.on_alarm == "stop":
                raise JudgeError(
                    self.work.alarm,
                    fix="take a better judge or other criteria; judge.controls.on_alarm=warn labels all the same",
                )


def open_judge(cfg: JudgeConfig, run_dir: str, seed: int) -> Judge:
    """The judge of a configuration, ready to be asked.

    Raises:
        ConfigError: its endpoint cannot be used.
        JudgeError: another process judges in the run folder.
        ModelError: a local model cannot.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    if cfg.endpoint:
        from reward_model.labeling.judge_endpoint import EndpointJudge

        return Judge(cfg, run_dir, EndpointJudge(cfg, cfg.endpoint, seed), seed)
    from reward_model.labeling.judge_local import LocalJudge

    return Judge(cfg, run_dir, LocalJudge(cfg, seed), seed)
