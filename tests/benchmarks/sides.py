"""The sides of the PPO benchmarks: TRL 1.12, and ours in every way of sharing weights; and the prompts for both."""

from __future__ import annotations

import argparse
import json
import shutil
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness import BUILD, HERE, Report, peer, python

PEER = "trl==1.12.0"
SETTING = {"batch": 32, "micro": 32, "budget": 48, "epochs": 2, "updates": 3}


@dataclass(frozen=True)
class Side:
    """One way to run our PPO; `group` is its table in README.md: TRL's architecture, or another one."""

    label: str
    overrides: tuple[str, ...]
    group: str


SIDES = {
    "separate": Side("four models, full", ("sharing=separate", "tuning={kind: full}"), "same"),
    "lora": Side("one base, LoRA per role", ("sharing=lora", "tuning={kind: lora}"), "other"),
    "hydra": Side(
        "one trunk, top layers per role",
        ("sharing=hydra", "tuning={kind: full, layers: 8}", "critic_init=policy", "critic_layers=2"),
        "other",
    ),
}


def existing(names: typing.Iterable[str] = tuple(SIDES)) -> list[str]:
    """Those whose overrides this version of PPO knows."""
    return [name for name in names if all(map(_is_known, SIDES[name].overrides))]


def _is_known(override: str) -> bool:
    from rlhf.config_schema import PPOStage

    key, _, value = override.partition("=")
    field = PPOStage.model_fields.get(key.split(".")[0])
    is_choice = field is not None and typing.get_origin(field.annotation) is typing.Literal
    choices = typing.get_args(field.annotation) if is_choice else ()
    return field is not None and ("." in key or not choices or value in choices)


def arguments(description: str | None, *, rounds: int) -> argparse.Namespace:
    """`--rounds`, `--epochs`, `--prompts`, `--updates` and `--sides`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--epochs", type=int, default=SETTING["epochs"], help="passes of the update over the rollouts")
    parser.add_argument("--updates", type=int, default=SETTING["updates"], help="counted steps per round")
    parser.add_argument("--prompts", choices=["equal", "ragged"], default="equal", help="their lengths")
    parser.add_argument(
        "--sides", nargs="+", choices=list(SIDES), default=existing(), help="ours; default: all there are"
    )
    args = parser.parse_args()
    if missing := set(args.sides) - set(existing(args.sides)):
        parser.error(f"this version of PPO does not know {', '.join(sorted(missing))}")
    return args


def runners(
    args: argparse.Namespace, *, with_peer: bool = True, profile: bool = False
) -> dict[str, Callable[[], Report]]:
    """Name -> what runs that side once, in a process of its own; TRL's is `peer`."""
    model, prompts = prepare(args.prompts)
    flags = [part for name, value in setting(args).items() for part in (f"--{name}", value)]
    found: dict[str, Callable[[], Report]] = {}
    for name in args.sides:
        extra = ["--profile"] if profile else []
        texts = BUILD / f"prompts.{args.prompts}.text.jsonl"
        found[name] = lambda name=name, extra=extra, texts=texts: python(
            HERE / "ours_ppo.py", "--model", model, "--prompts", texts, *flags, *extra, *SIDES[name].overrides
        )
    if with_peer:
        trl = peer(PEER)
        found["peer"] = lambda: python(
            HERE / "peers" / "trl_ppo.py", "--model", model, "--prompts", prompts, *flags, path=trl
        )
    return found


def setting(args: argparse.Namespace) -> dict[str, int]:
    """What both sides are told."""
    return {**SETTING, "epochs": args.epochs, "updates": args.updates}


def recorded(args: argparse.Namespace, reports: dict[str, list[Report]]) -> Report:
    """The setting and all reports, for the result file."""
    version = reports["peer"][0]["version"] if "peer" in reports else None
    model = {"model": "SmolLM2-135M", "prompts": args.prompts, "peer": version}
    return {**setting(args), **model, "rounds": args.rounds, "reports": reports}


def prepare(kind: str = "shipped") -> tuple[str, str]:
    """(model folder, file of prompts as token ids); beside it, with `.text`, the same prompts as text.

    Args:
        kind: `shipped` are the demo's prompts as they are; `equal` those of the most frequent length; `ragged` ask
            for one to four of the demo's things at once.
    """
    from rlhf.config import resolve_path
    from rlhf.config_schema import DatasetConfig
    from rlhf.data.records import read_prompts
    from rlhf.data.templates import prompt_tokens
    from rlhf.models.load import load_tokenizer, resolve_model

    model = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(model)
    source = DatasetConfig(path="shipped:data/plain_language/prompts.train.jsonl")
    texts = [_text(record.prompt) for record in read_prompts(source)]
    if kind == "ragged":
        texts = [" ".join(texts[i : i + 1 + i % 4]) for i in range(len(texts) - 3)]
    rows = [(text, prompt_tokens(tokenizer, text, chat=True)) for text in texts]
    if kind == "equal":
        length = Counter(len(tokens) for _, tokens in rows).most_common(1)[0][0]
        rows = [(text, tokens) for text, tokens in rows if len(tokens) == length]
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / f"prompts.{kind}.jsonl"
    file.write_text("".join(f"{json.dumps(tokens)}\n" for _, tokens in rows))
    (BUILD / f"prompts.{kind}.text.jsonl").write_text("".join(f"{json.dumps({'prompt': t})}\n" for t, _ in rows))
    if kind == "shipped":
        shutil.copy(resolve_path(source.path), BUILD / "prompts.text.jsonl")
    return model, str(file)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
