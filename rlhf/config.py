"""Load one YAML file into the typed configuration of a stage; report every error at once. No torch import."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.config_schema import STAGES
from rlhf.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
_SHOWN = 200  # characters of an override in a message


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text; here it is a float, as in YAML 1.2. A repeated key is an error, and so is
    one that is no single value: `{{name}}`, a placeholder nobody filled in, is a mapping as a key.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # `!!int x`; Python's own error would not know the line
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problem = f"a key is a {key_node.id}, not a single value"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is set twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# `off` is a word here (tracking.wandb=off), as in YAML 1.2: only true and false are booleans. So is a date: a run
# folder may be named 2020-01-01, and no key holds a point in time.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def shipped_configs() -> Path:
    """The folder of the shipped configurations: inside the installed package, or beside it in a clone."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_config(name: str, stage: str) -> Path:
    """A path as given, else a shipped configuration by name: `plain_language` is `<stage>/plain_language.yaml`.

    Raises:
        ConfigError: nothing is found, or a folder; the message lists the shipped names.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = shipped_configs()
    relative = name.removeprefix("configs/").removesuffix(".yaml")
    for candidate in (shipped / stage / f"{relative}.yaml", shipped / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    if given.is_dir():
        files = sorted(p.name for p in given.glob("*.yaml"))
        listed = ", ".join(files[:5]) or "it has no .yaml"
        raise ConfigError(f"{name} is a folder, not a configuration", fix=f"name a file in it: {listed}")
    if elsewhere := sorted(p.parent.name for p in shipped.glob(f"*/{given.name}.yaml")):
        commands = ", ".join(f"`rlhf {other} {given.name}`" for other in elsewhere)
        raise ConfigError(f"the stage {stage} has no configuration {name!r}", fix=f"give a file, or run {commands}")
    names = sorted(p.stem for p in (shipped / stage).glob("*.yaml"))
    near = did_you_mean(given.stem, names)
    raise ConfigError(f"no configuration {name!r}", fix=f"give a file, or one of: {', '.join(names) or 'none'}{near}")


def resolve_path(path: str) -> str:
    """`shipped:x` is the file `x` among the shipped configurations; anything else stays."""
    return str(shipped_configs() / path.removeprefix("shipped:")) if path.startswith("shipped:") else path


def load(name: str | Path, stage: str, overrides: Iterable[str] = ()) -> Any:
    """The validated configuration of `stage`.

    Args:
        name: file, or the name of a shipped configuration.
        stage: key of `STAGES`.
        overrides: `a.b=c`; the value is read as YAML.

    Raises:
        ConfigError: naming the file and every key at fault, or the stage that the file is for.
    """
    path = find_config(str(name), stage)
    data = read_yaml(path)
    _check_stage(data, stage, source=str(path))
    for override in overrides:
        _apply(data, override)
    return validate(data, stage, source=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: with file and line when it is not YAML, or not a mapping.
    """
    try:
        data = yaml.load(path.read_bytes().decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text ({error.reason})", fix="save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}", fix="check indentation, quotes and colons") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply", fix="check its brackets") from None
    if not isinstance(data, dict):
        content = "is empty" if data is None else f"holds a {type(data).__name__}, not keys and values"
        raise ConfigError(f"{path} {content}", fix="start with `key: value`")
    return data


def _check_stage(data: dict[str, Any], stage: str, source: str) -> None:
    """A file whose keys are all those of another stage is named as such, in place of each of its keys.

    Raises:
        ConfigError: naming that stage.
    """
    if data.keys() <= STAGES[stage].model_fields.keys():
        return
    for other, model in STAGES.items():
        required = {key for key, field in model.model_fields.items() if field.is_required()}
        if required <= data.keys() <= model.model_fields.keys():
            raise ConfigError(
                f"{source} is a configuration of the stage {other}, not of {stage}",
                fix=f"run `rlhf {other} {source}`, or give a configuration of {stage}",
            )


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        example = f"{key or 'steps'}=5 (in a pipeline ppo.steps=5)"
        raise ConfigError(f"override {override!r} is not of the form a.b=c", fix=f"write for example {example}")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(
            f"override {override[:_SHOWN]!r}: the value is not valid YAML", fix="close the bracket, or quote the value"
        ) from None
    *parents, last = key.split(".")
    node = data
    for i, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            above = ".".join(parents[: i + 1])
            raise ConfigError(
                f"override {override[:_SHOWN]!r}: {above} is a single value", fix="name one of its keys, or itself"
            )
        node = child
    node[last] = value


def validate(data: dict[str, Any], stage: str, source: str) -> Any:
    """Check `data` against the stage's model; see `load`."""
    fix = "correct the keys above, in the file or with a.b=c on the command line"
    return _validated(STAGES[stage], data, source, f"the {stage} configuration", fix)


def from_arguments(model: type[BaseModel], given: dict[str, Any], overrides: Iterable[str], *, command: str) -> Any:
    """The validated settings of a command that reads no configuration file.

    Args:
        given: what stands on the command line by itself.
        overrides: `a.b=c`; the value is read as YAML.

    Raises:
        ConfigError: naming every key at fault.
    """
    data = dict(given)
    for override in overrides:
        _apply(data, override)
    return _validated(model, data, command, "its settings", "correct them on the command line, as a.b=c")


def _validated(model: type[BaseModel], data: dict[str, Any], source: str, what: str, fix: str) -> Any:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        listed: set[str] = set()
        lines = [_explain(model, e, listed) for e in error.errors()]
        count = f"{len(lines)} error{'s' if len(lines) > 1 else ''}"
        listing = "\n".join(f"  - {line}" for line in lines)
        raise ConfigError(f"{source}: {count} in {what}\n{listing}", fix=fix) from None


def _explain(model: type[BaseModel], error: Any, listed: set[str]) -> str:
    """One line on one error. `listed`: where the known keys have been listed, which is done once."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(location)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if not location:  # of several keys together: the message names them
        return message
    if kind == "extra_forbidden":
        known, parent = sorted(_fields_at(model, location[:-1])), ".".join(location[:-1])
        hint = did_you_mean(location[-1], known)
        if not hint and parent not in listed:
            listed.add(parent)
            hint = "; known: " + ", ".join(known)
        return f"{path}: unknown key{hint}"
    if kind in ("model_type", "dict_type"):  # pydantic would speak of dictionaries and instances
        message = "Input should be keys and values"
    if kind == "missing":
        return f"{path}: required, but not set"
    if kind == "literal_error":
        hint = did_you_mean(str(error["input"]), re.findall(r"'([^']+)'", message))
        return f"{path}: {message}, not {error['input']!r}{hint}"
    return f"{path}: {message}" + ("" if kind == "value_error" else f" (got {error['input']!r})")


def _fields_at(model: type[BaseModel], location: list[str]) -> set[str]:
    """Names of the fields of the nested model at `location`."""
    current: Any = model
    for part in location:
        if not isinstance(current, type) or part not in current.model_fields:
            continue  # an index of a list: the element's model is `current` already
        current = _nested_model(current.model_fields[part].annotation) or current
    return set(current.model_fields)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for a in typing.get_args(annotation) if (m := _nested_model(a))), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fingerprint(value: Any) -> str:
    """SHA-256 of a configuration (or anything JSON can hold), independent of the order of keys."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
