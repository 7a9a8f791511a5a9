"""The architecture, read from the syntax trees: who imports whom, who owns a library, how large things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for package in ("rlhf", "reward_model") for p in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
LAYERS = [
    "rlhf reward_model rlhf.errors rlhf.types rlhf.functional rlhf.functional.* reward_model.losses",
    "rlhf.config rlhf.config_base rlhf.config_labeling rlhf.config_ppo rlhf.config_reward rlhf.config_schema "
    "rlhf.files rlhf.runs rlhf.runtime rlhf.sharding rlhf.checkpoint rlhf.tensor_files "
    "rlhf.random_state rlhf.resume rlhf.tracking rlhf.kl_control rlhf.progress",
    "rlhf.data rlhf.data.* rlhf.models rlhf.models.*",
    "rlhf.rollout rlhf.rollout.* rlhf.supervised rlhf.supervised.* rlhf.eval rlhf.eval.* "
    "reward_model.model reward_model.ensemble reward_model.data reward_model.packing reward_model.finish "
    "reward_model.calibrate reward_model.measure "
    "reward_model.labeling reward_model.labeling.*",
    "rlhf.stages rlhf.stages.* reward_model.train",
    "rlhf.cli rlhf.cli_label rlhf.__main__ rlhf.dry_run rlhf.doctor rlhf.plan rlhf.planning rlhf.footprint "
    "rlhf.machine",
]
OWNERS = {
    "accelerate": {"rlhf.runtime"},
    "deepspeed": {"rlhf.runtime", "rlhf.sharding"},
    "wandb": {"rlhf.tracking"},
    "peft": {"rlhf.models.tuning", "rlhf.models.adapters"},
    "trl": {"rlhf.stages.sft", "rlhf.supervised.trainer"},
}
MAX_FILE, MAX_FUNCTION, MAX_STAGE_MAIN, MAX_PARAMETERS = 450, 60, 90, 8


def layer_of(module: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if any(fnmatch(module, name) for name in names.split())]
    assert len(found) == 1, f"{module} stands in {len(found)} layers; give it one in LAYERS"
    return found[0]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else str(node.module)


def ours(name: str) -> bool:
    return name.split(".")[0] in ("rlhf", "reward_model")


def functions(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree_of(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_module_has_one_layer() -> None:
    assert len(MODULES) > 40
    assert {layer_of(module) for module in MODULES} == set(range(len(LAYERS)))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """A layer imports itself and those below; a package's `__init__` says nothing."""
    wrong = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(module)
        if ours(name) and layer_of(name) > layer_of(module)
    ]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) == 4])
def test_stages_do_not_import_stages(module: str) -> None:
    assert not [name for _, name in imports(module) if ours(name) and name != module and layer_of(name) == 4]


def test_only_ppo_evaluate_and_label_know_the_reward_model() -> None:
    allowed = {"rlhf.stages.ppo", "rlhf.stages.evaluate", "rlhf.stages.label"}
    knowing = {m for m in MODULES for _, name in imports(m) if ours(m) and m[:4] == "rlhf" and name[:5] == "rewar"}
    assert knowing <= allowed


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) == 0])
def test_pure_functions_import_torch_and_the_standard_library_only(module: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    wrong = [name for _, name in imports(module) if name.split(".")[0] not in allowed]
    assert all(ours(name) and layer_of(name) == 0 for name in wrong)


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_door(library: str) -> None:
    named = {m for m in MODULES for _, name in imports(m) if name.split(".")[0] == library}
    assert named <= OWNERS[library]
    assert named or library == "deepspeed", f"{library} is imported nowhere: is the rule still read?"


@pytest.mark.parametrize("forbidden", ["pickle", "dill", "joblib", "marshal"])
def test_nothing_can_execute_what_it_reads(forbidden: str) -> None:
    assert not [m for m in MODULES for _, name in imports(m) if name.split(".")[0] == forbidden]
    calls = [node for m in MODULES for node in ast.walk(tree_of(m)) if isinstance(node, ast.Call)]
    named = {ast.unparse(call.func) for call in calls}
    assert not named & {"eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


@pytest.mark.parametrize(
    "statement", ["import rlhf.config, rlhf.cli", "import rlhf.stages.pipeline", "import rlhf.runs"]
)
def test_the_command_line_starts_without_torch(statement: str) -> None:
    heavy = "torch transformers accelerate peft trl wandb datasets"
    code = f"{statement}\nimport sys\nprint([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module: str) -> None:
    relative = MODULES[module].relative_to(ROOT)
    wrong = []
    if (lines := len(MODULES[module].read_text(encoding="utf-8").splitlines())) > MAX_FILE:
        wrong.append(f"{relative} has {lines} lines (at most {MAX_FILE})")
    for node in functions(module):
        where = f"{relative}:{node.lineno} {node.name}"
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        cap = MAX_STAGE_MAIN if layer_of(module) == 4 and node.name == "main" else MAX_FUNCTION
        if length > cap:
            wrong.append(f"{where} has {length} lines (at most {cap})")
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
        if count > MAX_PARAMETERS:
            wrong.append(f"{where} has {count} parameters (at most {MAX_PARAMETERS})")
    assert not wrong


def test_packages_are_at_most_two_folders_deep() -> None:
    assert max(len(path.relative_to(ROOT).parts) for path in FILES) <= 3


def test_the_rules_see_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of imports itself: inside functions, under TYPE_CHECKING, of a name or of a module."""
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlhf.stages import ppo\n"
        "def f():\n    import accelerate.utils as u\n    from rlhf.models.load import load_tokenizer\n"
    )
    monkeypatch.setitem(MODULES, "rlhf.functional.bad", bad)
    assert list(imports("rlhf.functional.bad")) == [
        (1, "typing"),
        (3, "rlhf.stages.ppo"),
        (5, "accelerate.utils"),
        (6, "rlhf.models.load"),
    ]
    tree_of.cache_clear()
