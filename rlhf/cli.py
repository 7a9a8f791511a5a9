"""The command line: `rlhf <stage> CONFIG [a.b=c ...]`. A stage's module is imported only when it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

import rlhf
from rlhf import cli_label, cli_reward, config, runs
from rlhf.cli_groups import STAGE
from rlhf.errors import LabelsPending, RlhfError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RLHF: sft, sample, label, reward, ppo, evaluate, report; or all of them: pipeline.",
)

MODULES = {
    "sft": "rlhf.stages.sft",
    "sample": "rlhf.stages.sample",
    "label": "rlhf.stages.label",
    "reward": "reward_model.train",
    "ppo": "rlhf.stages.ppo",
    "evaluate": "rlhf.stages.evaluate",
    "report": "rlhf.stages.report",
    "pipeline": "rlhf.stages.pipeline",
}

RESUMABLE = ("sft", "reward", "ppo")

HELP = {
    "sft": "Supervised fine-tuning on demonstrations.",
    "sample": "Sample K completions per prompt into the rollout buffer.",
    "label": "Preference labels for sampled completions.",
    "reward": "Train the reward model on preferences.",
    "ppo": "PPO with KL control against the frozen reference.",
    "evaluate": "Compare policies on held-out prompts.",
    "report": "One self-contained report.html and summary.json.",
    "pipeline": "All stages one after the other, each in its own process; finished ones are skipped.",
}

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or the name of a shipped one")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="override single keys")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check what is on this disk, print what would run, and end")]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|PATH",
        help="auto goes on from the newest checkpoint, never starts anew; PATH: the folder of a checkpoint",
    ),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="ppo: a trace of the second step, and what each phase reached")
]


def _command(stage: str, app: typer.Typer, name: str) -> None:
    @app.command(name, help=HELP[stage])
    def command(
        config_name: ConfigArgument,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        resume: Resume = "auto",
        profile: Profile = False,
    ) -> None:
        options = runs.RunOptions(resume=resume, profile=profile)
        _shielded(lambda: run_stage(stage, config_name, overrides or [], options, dry_run=dry_run))


GROUPS = {"label": cli_label.app, "reward": cli_reward.app}

for _stage in MODULES:
    if _stage in GROUPS:
        _command(_stage, GROUPS[_stage], STAGE)
        app.add_typer(GROUPS[_stage], name=_stage)
    else:
        _command(_stage, app, _stage)
app.add_typer(cli_reward.rollouts_app, name="rollouts")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhf {rlhf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="and exit")] = False,
) -> None:
    """RLHF: sft, sample, label, reward, ppo, evaluate, report; or all of them: pipeline."""


@app.command(help="What this machine has, and what is missing.")
def doctor() -> None:
    from rlhf.doctor import report

    _shielded(report)


@app.command(help="Memory and time that a configuration needs: per role, ZeRO stage and way of sharing; what fits.")
def plan(
    config_name: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per node")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of one")] = None,
    nodes: Annotated[int, typer.Option(help="with as many GPUs each")] = 1,
    gpu: Annotated[str | None, typer.Option(help="by name: a100-40, a100, h100, h200, l40s")] = None,
    rates: Annotated[
        tuple[float, float] | None, typer.Option(help="TFLOP/s of products in that precision, and GB/s of its memory")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="bytes and seconds, for programs")] = False,
) -> None:
    def action() -> None:
        from rlhf.plan import Options, main

        main(config_name, overrides or [], Options(gpus, nodes, gpu, gpu_memory, rates, as_json))

    _shielded(action)


def run_stage(stage: str, config_name: str, overrides: list[str], options: runs.RunOptions, *, dry_run: bool) -> None:
    """Load the configuration, run one stage, write its result.json."""
    from rlhf.errors import ConfigError

    if options.resume not in ("auto", "never"):
        if stage not in RESUMABLE:
            raise ConfigError(f"--resume {options.resume!r}: {stage} has no checkpoints", fix="use auto or never")
        if not (Path(options.resume).expanduser() / "MANIFEST.json").is_file():
            fix = "use auto or never, or name a folder such as runs/NAME/checkpoints/step_10"
            raise ConfigError(f"--resume {options.resume!r} is no checkpoint", fix=fix)
    if options.profile and stage != "ppo":
        raise ConfigError(f"--profile is not known to {stage}", fix="profile the stage ppo: rlhf ppo CONFIG --profile")
    cfg = config.load(config_name, stage, overrides)
    if dry_run or stage == "pipeline":
        from rlhf.dry_run import describe

        # A pipeline finds out now, and not after hours, that a file of its last stage is missing.
        describe(stage, cfg, quiet=not dry_run)
    if dry_run:
        return
    module = importlib.import_module(MODULES[stage])
    if stage == "pipeline":
        module.main(cfg, options)
        return
    if int(os.environ.get("RANK", "0")) == 0:
        with runs.recorded(cfg, stage) as record:
            record(module.main(cfg, options))
    else:
        module.main(cfg, options)


_DISK_FIXES = {
    errno.ENOSPC: "free disk space, or set run_dir to another disk",
    errno.EDQUOT: "free disk space of your quota, or set run_dir to another disk",
    errno.EACCES: "check the permissions, or set run_dir to a folder of yours",
    errno.EPERM: "check the permissions, or set run_dir to a folder of yours",
    errno.EROFS: "this disk can only be read: set run_dir to another one",
    errno.ENOTDIR: "a file stands where a folder is needed: correct the path, or run_dir",
    errno.EEXIST: "a file stands where a folder is needed: correct the path, or run_dir",
}


def _shielded(action) -> None:  # type: ignore[no-untyped-def]
    """Users' errors, and the disk's that name a path, become one panel and exit code 2; bugs keep their traceback."""
    try:
        action()
    except LabelsPending as error:
        Console().print(f"{error.message}\n{error.fix}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except RlhfError as error:
        _refuse(type(error).__name__, error.message, error.fix)
    except OSError as error:
        if error.filename is None:
            raise
        fix = _DISK_FIXES.get(error.errno or 0, "check that path, and the disk it is on")
        _refuse(type(error).__name__, f"{error.filename}: {error.strerror}", fix)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in runs.INSTALLS:
            raise
        fix = f"pip install {runs.INSTALLS[package]}"
        _refuse(type(error).__name__, f"this needs {package}, which is not installed", fix)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; run the same command again to go on")
        raise typer.Exit(130) from None


def _refuse(title: str, message: str, fix: str) -> NoReturn:
    """Show one panel, whatever the number of processes, and exit with code 2."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        raise typer.Exit(2) from None
    body = Text(message)
    if fix:
        body.append("\n\nfix: ", style="bold green").append(fix)
    Console(stderr=True).print(Panel(body, title=title, title_align="left", border_style="red"))
    sys.stderr.flush()
    raise typer.Exit(2) from None


cli_label.add_tools(_shielded)
cli_reward.add_tools(_shielded)
