"""What the documents promise exists: stages, configurations, paths, launch files, make targets."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlhf import config, plan
from rlhf.cli import MODULES
from rlhf.config_schema import DatasetConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", ".github/CONTRIBUTING.md", "launch/README.md", "reward_model/labeling/README.md"]
WITHOUT_CONFIGURATION = {("reward", "eval"), ("rollouts", "score")}
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))
COMMANDS = {*MODULES, "doctor", "plan"}
TOOLS = {"serve", "invite", "queue", "import", "export", "ai"}
"""Commands of a labeling project, behind `rlhf label`."""

FENCE = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?")
ROOM_FILES = {"Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".pre-commit-config.yaml"}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """The lines of fenced blocks (continued ones joined), and every inline code."""
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    return lines + INLINE.findall(FENCE.sub("", text))


def rlhf_calls(text: str) -> Iterator[list[str]]:
    """The arguments of every `rlhf ...` and `... -m rlhf ...`; comments are dropped."""
    for line in code_of(text):
        if match := re.search(r"(?:^|-m )rlhf(?: +(.*))?$", line.strip()):
            yield shlex.split(match.group(1) or "", comments=True)


def paths_in(text: str) -> set[str]:
    """What looks like a path of this repository: its first part is one of our rooms."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "build", "dist", ".venv"}
    words = {word for line in code_of(text) for word in re.split(r"[\s=:,()'\"\[\]]+", line)}
    return {w for w in words if (PATH.fullmatch(w) and w.split("/")[0] in rooms) or w in ROOM_FILES}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_rlhf_command_names_a_stage_and_a_configuration(document: str) -> None:
    for arguments in rlhf_calls(text_of(document)):
        positional = [a for a in arguments if not a.startswith("-")]
        if not positional or positional[0] in ("...", "<stage>"):
            continue
        stage, *rest = positional
        if (stage, *rest[:1]) in WITHOUT_CONFIGURATION:
            continue
        assert stage in COMMANDS, f"{document}: rlhf {' '.join(arguments)}"
        if stage == "label" and rest[:1] and rest[0] in TOOLS:
            stage, rest = "labeling", [word for word in rest[1:] if word != "FILE"]
        if not rest or rest[0] in ("...", "CONFIG"):
            continue
        name, *overrides = [word for word in rest if word not in ("auto", "never")]
        if name.startswith("runs/"):  # a file that the pipeline writes: <run>/<stage>/<stage>.yaml, the report on top
            assert Path(name).name == f"{stage}.yaml", name
            assert stage == "report" or Path(name).parent.name == stage, name
            continue
        name = str(ROOT / name) if "/" in name else name
        if stage == "plan":  # finds out itself which stage's it is
            plan.load(name, overrides)
            continue
        config.load(config.find_config(name, stage), stage, overrides)


def test_the_commands_of_the_documents_are_found_at_all() -> None:
    found = {arguments[0] for document in DOCUMENTS for arguments in rlhf_calls(text_of(document)) if arguments}
    assert {"sft", "sample", "label", "reward", "ppo", "evaluate", "report", "pipeline", "doctor", "plan"} <= found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_of_the_repository_exists(document: str) -> None:
    found = paths_in(text_of(document))
    assert found, f"{document} names no path: does the pattern still fit?"
    assert not [path for path in sorted(found) if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    targets = [target for target in LINK.findall(text_of(document)) if "://" not in target]
    assert not [target for target in targets if not (folder / target).exists()]


@pytest.mark.parametrize("document", [*DOCUMENTS, *(str(p.relative_to(ROOT)) for p in LAUNCH_FILES)])
def test_every_launch_file_that_is_named_exists(document: str) -> None:
    text = text_of(document)
    named = set(re.findall(r"launch/([\w.-]+\.(?:yaml|json))", text))
    if document.startswith("launch/"):
        named |= set(re.findall(r"(?<![\w/.])([a-z0-9_]+\.(?:yaml|json))\b", text))
    assert not [name for name in sorted(named) if not (ROOT / "launch" / name).exists()]


def test_the_launch_guide_names_every_launch_file() -> None:
    text = text_of("launch/README.md")
    assert not [path.name for path in LAUNCH_FILES if f"`{path.name}`" not in text]


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=[path.stem for path in LAUNCH_FILES])
def test_accelerate_reads_every_launch_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line for line in lines if line.startswith("#"))
    assert f"--config_file launch/{path.name}" in comment
    assert "Hardware:" in comment
    if read.deepspeed_config:
        assert "mixed_precision" not in yaml.safe_load(path.read_text(encoding="utf-8"))  # accelerate refuses it
        deepspeed = json.loads((ROOT / read.deepspeed_config["deepspeed_config_file"]).read_text(encoding="utf-8"))
        assert deepspeed["zero_allow_untested_optimizer"] is True
        assert deepspeed["zero_force_ds_cpu_optimizer"] is False
        if path.stem.startswith("cpu"):
            assert deepspeed["zero_optimization"]["reduce_bucket_size"] <= 10_000_000
    else:
        assert read.mixed_precision == "no"  # precision belongs to the run's configuration


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_exists(document: str) -> None:
    makefile = text_of("Makefile")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {m for line in code_of(text_of(document)) for m in re.findall(r"\bmake ([a-z][a-z-]*)", line)}
    assert named <= targets


# Red until the measured numbers stand in the documents.
@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_placeholder_is_left(document: str) -> None:
    assert not re.findall(r"\{\{[^}]*\}\}", text_of(document))


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    extras = [rows for name, rows in project["optional-dependencies"].items() if name != "dev"]
    requirements = [*project["dependencies"], *(row for rows in extras for row in rows)]
    declared = {re.split(r"[<>=! []", requirement)[0] for requirement in requirements}
    distributions = {
        "yaml": "pyyaml",
        "argon2": "argon2-cffi",
        "crowdkit": "crowd-kit",
        "linkify_it": "linkify-it-py",
        "markdown_it": "markdown-it-py",
        "multipart": "python-multipart",
        "sklearn": "scikit-learn",
        "starlette": "fastapi",
    }
    imported = set()
    for file in (file for package in ("rlhf", "reward_model") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"rlhf", "reward_model"}
    assert {distributions.get(name, name) for name in foreign} <= declared


def test_the_packages_say_that_they_are_typed() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in ("rlhf", "reward_model"))


def test_the_readme_has_a_line_for_every_format() -> None:
    formats = set(DatasetConfig.model_json_schema()["properties"]["format"]["enum"]) - {"auto"}
    rows = set(re.findall(r"^\| `(\w+)` \|", text_of("README.md").split("## Data formats")[1], re.MULTILINE))
    assert formats <= rows


def test_the_doctor_says_where_the_launch_files_are(capsys: pytest.CaptureFixture) -> None:
    from rlhf import doctor

    rows = dict(doctor._inputs())
    assert rows["launch files"].splitlines()[0] == str(ROOT / "launch")


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 220
