"""Metrics and samples of one run: JSON lines always, Weights & Biases beside them when it is there.

The only door to wandb, which is imported when a run opens. `metrics.jsonl` is the truth: on a resume the
lines after the checkpoint are dropped, and what is kept is replayed into a W&B run that does not know it yet
(an offline run never does), so that each W&B run holds the whole curve under our own step. A fresh start drops
the files of an earlier attempt when it writes its first line, so that a run refused before loses nothing.
Nothing that W&B does may stop or slow a training: the first failure is said once, and W&B is left alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf.files import atomic_write
from rlhf.runs import RESULT

if TYPE_CHECKING:
    from rlhf.config_schema import TrackingConfig

METRICS, SAMPLES, SUMMARY = "metrics.jsonl", "samples.jsonl", "summary.json"
TABLE_ROWS = 4
"""Rows of a sample table in W&B; samples.jsonl has them all."""
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 20.0, 60.0

REDACTED = "<redacted>"
_SECRET_WORDS = {"token", "key", "apikey", "password", "passwd", "secret", "credential", "credentials"}
_VOCABULARY_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask"}
_MODES = {"online": "online", "shared": "online", "run": "online", "offline": "offline", "dryrun": "offline"}


class Tracker:
    """Where a stage writes its curves and sample texts. Made by `Tracker.open`; a context manager."""

    def __init__(self, run_dir: Path, *, enabled: bool, resumed: bool) -> None:
        self.run_dir = run_dir
        self._run: _WandbRun | None = None
        self._enabled = enabled
        self._stale = [RESULT] if resumed else [RESULT, METRICS, SAMPLES, SUMMARY]

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        cfg: TrackingConfig,
        *,
        stage: str,
        config: dict[str, Any],
        enabled: bool = True,
        resume_step: int | None = None,
        say: Callable[[str], None] = print,
    ) -> Tracker:
        """Start tracking, and say in one line where the numbers go.

        Args:
            run_dir: holds metrics.jsonl, samples.jsonl and, offline, wandb/.
            cfg: `WANDB_MODE` in the environment wins over `cfg.wandb`, except over `off`.
            stage: W&B's job type.
            config: the resolved configuration, shown in W&B with secrets redacted.
            enabled: False on every rank but 0; all methods then do nothing.
            resume_step: last step the resumed checkpoint has done; later lines are dropped.
                None is a fresh start: what an earlier attempt left here is dropped at the first line written.
            say: shows one line of text.
        """
        folder = Path(run_dir)
        resumed = resume_step is not None
        tracker = cls(folder, enabled=enabled, resumed=resumed)
        if not enabled:
            return tracker
        folder.mkdir(parents=True, exist_ok=True)
        if resumed:
            tracker.truncate_after(resume_step)
        tracker._run = _WandbRun.start(folder, cfg, stage, config, resumed=resumed, say=say)
        if tracker._run and resumed:
            tracker._run.replay(_rows(folder / METRICS))
        return tracker

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that this run goes on from; none on a fresh start."""
        return [] if not self._enabled or METRICS in self._stale else list(_rows(self.run_dir / METRICS))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line of metrics.

        Args:
            step: the stage's own step, the x-axis everywhere.
            metrics: name -> number, or a tensor of one element. NaN and infinity become null.

        Raises:
            ValueError: a metric is named `step`.
            TypeError: a metric is not a number.
        """
        if not self._enabled:
            return
        if "step" in metrics:
            raise ValueError("a metric is named 'step', which is the name of the x-axis; rename it")
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._append(METRICS, {"step": step, **numbers})
        if self._run:
            self._run.log(step, numbers)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append one line per row; the first few (prompt, response, score) become a table in W&B.

        Raises:
            ValueError: a row has a `step` that is another one.
        """
        if not self._enabled or not rows:
            return
        if any(row.get("step", step) != step for row in rows):
            raise ValueError(f"a sample row carries another step than {step}; leave `step` out of the rows")
        plain = [_plain(row) for row in rows]
        self._append(SAMPLES, *({"step": step, **row} for row in plain))
        if self._run:
            self._run.log_table(step, plain[:TABLE_ROWS])

    def summary(self, values: dict[str, Any]) -> None:
        """Merge headline numbers into summary.json and into the summary of the W&B run."""
        if not self._enabled:
            return
        self._drop_stale()
        path, plain = self.run_dir / SUMMARY, _plain(values)
        before: Any = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
        merged = {**(before if isinstance(before, dict) else {}), **plain}
        atomic_write(path, json.dumps(merged, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if self._run:
            self._run.summary(plain)

    def truncate_after(self, step: int) -> None:
        """Atomically drop the lines after `step`, and lines that a crash tore, from both files."""
        if not self._enabled:
            return
        for name in (METRICS, SAMPLES):
            path = self.run_dir / name
            if path.exists():
                kept = (row for row in _rows(path) if row["step"] <= step)
                atomic_write(path, "".join(_line(row) for row in kept))

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run, as failed unless `exit_code` is 0. The tracker goes on writing JSON lines."""
        if exit_code == 0:
            self._drop_stale()  # a run that ended well and wrote no line has none
        if self._run:
            self._run.finish(exit_code)
            self._run = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)

    def _drop_stale(self) -> None:
        """Remove, once, what is not of this run: its first line is the moment from which the earlier one is over."""
        if self._enabled:
            for name in self._stale:
                (self.run_dir / name).unlink(missing_ok=True)
            self._stale = []

    def _append(self, name: str, *rows: dict[str, Any]) -> None:
        self._drop_stale()
        # Opened per call: one line per step is cheap, and closing the file flushes it.
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file that carry a step; a torn line is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
                row = json.loads(line)
                if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row


def _number(value: Any) -> float | int | None:
    """A plain number of Python; None when it is not finite, which JSON cannot hold."""
    if isinstance(value, str) or value is None:
        raise TypeError(f"a metric is {value!r}, not a number; use summary() or samples() for text")
    number = value if type(value) in (int, float) else float(value)
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity are None, tuples lists, one-element tensors numbers."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    try:
        return _number(value)
    except (TypeError, ValueError):
        return str(value)


def redact(config: Any) -> Any:
    """A copy of `config` without secrets.

    Redacted are text under a key one of whose words is token, key, password, secret .. (`hf_token`, not
    `max_new_tokens` and not `eos_token`), and any text that holds the value of such an environment variable.
    """
    hidden = [value for name, value in os.environ.items() if _secret_name(name) and len(value) >= 8]

    def clean(value: Any, secret: bool) -> Any:
        if isinstance(value, dict):
            return {key: clean(item, secret or _secret_name(str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, secret) for item in value]
        if secret and isinstance(value, str | int) and not isinstance(value, bool):
            return REDACTED
        return REDACTED if isinstance(value, str) and any(text in value for text in hidden) else value

    return clean(config, False)


def _secret_name(name: str) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    if _VOCABULARY_TOKENS & set(words):
        return False
    return bool(_SECRET_WORDS & set(words))


class _WandbRun:
    """One W&B run whose every failure is said once and then ends it."""

    def __init__(self, wandb: ModuleType, run: Any, say: Callable[[str], None], data_dir_set: bool) -> None:
        self._wandb, self._say = wandb, say
        self._run: Any = run  # None once it failed or finished
        self._data_dir_set = data_dir_set

    @classmethod
    def start(
        cls,
        run_dir: Path,
        cfg: TrackingConfig,
        stage: str,
        config: dict[str, Any],
        *,
        resumed: bool,
        say: Callable[[str], None],
    ) -> _WandbRun | None:
        """The run, or None when W&B is off, missing or broken. Says which."""
        where = f"tracking: {run_dir / METRICS}"
        wished = "off" if cfg.wandb == "off" else os.environ.get("WANDB_MODE") or cfg.wandb
        if wished in ("off", "disabled"):
            say(f"{where}; W&B is off")
            return None
        try:
            import wandb
        except Exception as error:  # a broken installation raises more than ImportError
            say(f"{where}; W&B is not available ({_short(error)}), training goes on without it")
            return None
        data_dir_set = _keep_data_in(run_dir)
        failures = []
        for mode, reason in _modes_to_try(wandb, wished):
            try:
                run = _init(wandb, run_dir, cfg, mode, resumed, stage=stage, config=config)
            except Exception as error:
                failures.append(f"{mode}: {_short(error)}")
                continue
            said = "".join(f"; {failure}" for failure in failures)
            if mode == "online":
                say(f"{where}; W&B online at {run.url}{said}")
            else:
                said += f"; {reason}" if reason else ""
                say(f"{where}; W&B offline{said}; upload with: wandb sync {Path(run.dir).parent}")
            return cls(wandb, run, say, data_dir_set)
        if data_dir_set:
            os.environ.pop("WANDB_DATA_DIR", None)
        say(f"{where}; W&B did not start ({'; '.join(failures)}), training goes on without it")
        return None

    def replay(self, rows: Iterator[dict[str, Any]]) -> None:
        """Log the kept lines that this W&B run does not have: all of them offline, none when it resumed."""
        known = self._guard(lambda: self._run.step) or 0
        for row in rows:
            if row["step"] >= known:
                self.log(row["step"], {name: value for name, value in row.items() if name != "step"})

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        finite = {name: value for name, value in numbers.items() if value is not None}
        self._guard(lambda: self._run.log({"step": step, **finite}, step=step))

    def log_table(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = ["prompt", "response", "score"]

        def cell(value: Any) -> Any:
            return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value

        def send() -> None:
            data = [[cell(row.get(column)) for column in columns] for row in rows]
            self._run.log({"step": step, "samples": self._wandb.Table(columns=columns, data=data)}, step=step)

        self._guard(send)

    def summary(self, values: dict[str, Any]) -> None:
        self._guard(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int) -> None:
        self._guard(lambda: self._run.finish(exit_code=exit_code))
        self._run = None
        if self._data_dir_set:
            os.environ.pop("WANDB_DATA_DIR", None)

    def _guard(self, action: Callable[[], Any]) -> Any:
        if self._run is None:
            return None
        try:
            return action()
        except Exception as error:
            self._run = None
            self._say(f"tracking: W&B failed ({_short(error)}) and is left alone; {METRICS} goes on")
            return None


def _modes_to_try(wandb: ModuleType, wished: str) -> list[tuple[str, str]]:
    """(mode, reason for being offline). Online falls back to offline, so that no curve is lost."""
    if _MODES.get(wished) == "offline":
        return [("offline", "")]
    try:
        reason = "" if _logged_in(wandb) else "not logged in"
    except Exception as error:
        reason = f"login unknown: {_short(error)}"
    # Without a key W&B would ask for one on the terminal and hold up the run.
    return [("offline", reason)] if reason else [("online", ""), ("offline", "")]


def _logged_in(wandb: ModuleType) -> bool:
    """Whether W&B's settings or the netrc file hold a credential for its server. Uses no network."""
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if os.environ.get("WANDB_API_KEY") or settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    named = os.environ.get("NETRC")
    candidates = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    host = urlsplit(settings.base_url).netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return any(bool(netrc.netrc(path).authenticators(host)) for path in candidates if path.exists())
    return False


def _keep_data_in(run_dir: Path) -> bool:
    """Point W&B's staging folder for tables, by default in the home folder, into the run; False if set."""
    if os.environ.get("WANDB_DATA_DIR"):
        return False
    os.environ["WANDB_DATA_DIR"] = str((run_dir / "wandb" / "data").resolve())
    return True


def _init(
    wandb: ModuleType,
    run_dir: Path,
    cfg: TrackingConfig,
    mode: str,
    resumed: bool,
    *,
    stage: str,
    config: dict[str, Any],
) -> Any:
    wished = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_TIMEOUT_S,
        "finish_timeout": FINISH_TIMEOUT_S,  # a dead network must not hold up the end of a run
        "disable_git": True,  # W&B would upload the diff of the working tree
        "disable_code": True,
    }
    known = wandb.Settings.model_fields  # older versions lack some
    run = wandb.init(
        dir=str(run_dir),
        mode=mode,
        project=cfg.project,
        group=cfg.group,
        tags=cfg.tags,
        name=run_dir.resolve().name,
        job_type=stage,
        config=redact(config),
        id=_run_id(run_dir, resumed),
        resume="allow" if resumed and mode == "online" else None,  # offline runs do not honour it
        reinit="create_new",
        settings=wandb.Settings(**{name: value for name, value in wished.items() if name in known}),
    )
    # W&B's hidden step must rise; ours is logged as a metric of its own, and is the x-axis of all others.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(run_dir: Path, resumed: bool) -> str:
    """The run's id in W&B: kept over a resume, new on a fresh start."""
    path = run_dir / "wandb" / "run_id"
    if resumed and path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    new = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, new + "\n")
    return new


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
