"""A name in a file -> an object, and back.

A plug-in is one file in its kind's folder; the name is the file's, the object the one name in its
`__all__`. "gradcam" under explainers is explainers/gradcam.py. A user's own is
"package.module:Name". There is no table to register in.
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from typing import Any, Union

import pydantic

from trompe.interfaces import (
    Attack,
    Data,
    Explainer,
    InputError,
    Metric,
    Poisoning,
    TargetMap,
    Trigger,
)

KINDS: dict[str, Any] = {
    "data": Data,
    "models": None,
    "triggers": Trigger,
    "target_maps": TargetMap,
    "explainers": Explainer,
    "attacks": Attack,
    "metrics": Metric,
}
_KIND_OF = {protocol: kind for kind, protocol in KINDS.items() if protocol is not None}
_KIND_OF[Poisoning] = "attacks"  # these give training samples instead of a model


def names(kind: str) -> tuple[str, ...]:
    """All plug-ins of a kind, sorted."""
    _check_choice("kind", kind, KINDS)
    package = importlib.import_module(f"trompe.{kind}")
    found = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return tuple(sorted(found))


def find(kind: str, name: str) -> Any:
    """The plug-in's class or function. InputError for a name that is not there."""
    if ":" in name:
        return _find_users(kind, name)
    _check_choice(kind, name.replace("-", "_"), names(kind))
    module = importlib.import_module(f"trompe.{kind}.{name.replace('-', '_')}")
    (public,) = module.__all__
    return getattr(module, public)


def _find_users(kind: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"{kind} {name!r}: cannot be imported ({error}); it must read package.module:Name and "
            "be importable from where you are (set PYTHONPATH)"
        ) from error


def build(kind: str, table: Any, where: str = "") -> Any:
    """{"kind": name, setting: value, ...} -> the plug-in with these settings.

    Nested tables become plug-ins or dataclasses by the fields' annotations. Raises InputError that
    names the key, its nearest neighbour, and `where` it stands.
    """
    where = where or kind
    table = {"kind": table} if isinstance(table, str) else table
    if not isinstance(table, dict) or not isinstance(table.get("kind"), str):
        raise InputError(
            f"{where}: is {table!r}; it must be a table with a key kind, one of "
            f"{', '.join(names(kind))}"
        )
    settings = {key: value for key, value in table.items() if key != "kind"}
    built = build_dataclass(find(kind, table["kind"]), settings, where)
    if kind in ("explainers", "triggers"):  # what a model answers is remembered by them
        try:
            hash(built)
        except TypeError as error:
            raise InputError(
                f"{where}: {table['kind']!r} cannot be a key ({error}); write "
                "@dataclass(frozen=True), with tuples for lists"
            ) from error
    return built


def build_dataclass(cls: Any, table: dict[str, Any], where: str, start: Any = None) -> Any:
    """A dataclass from a table of its fields (see `build`), or `start` with these changed.

    A nested table changes the field's default: [attack.training] with epochs alone keeps the
    attack's other training settings.
    """
    parameters = inspect.signature(cls).parameters
    hints = {n: hint for n, hint in typing.get_type_hints(cls).items() if n in parameters}
    defaults = {n: _default(cls, n) if start is None else getattr(start, n) for n in parameters}
    for key in table:
        if key not in hints:
            raise InputError(f"{where}.{key}: unknown key{nearest(key, hints)}")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}", defaults[key])
        for key, value in table.items()
    }
    for name, hint in hints.items():  # TOML cannot say None: a key left out does
        if defaults[name] is _MISSING and type(None) in typing.get_args(hint):
            values.setdefault(name, None)
    missing = [n for n in parameters if n not in values and defaults[n] is _MISSING]
    if missing:
        raise InputError(f"{where}.{missing[0]}: is missing; give it a value")
    try:
        return cls(**values) if start is None else dataclasses.replace(start, **values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


_MISSING = inspect.Parameter.empty
_LARGEST = 2**62  # numbers that torch takes, with some room for seeds made from seeds


def _default(cls: Any, name: str) -> Any:
    """The default of a field, _MISSING if it has none."""
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return inspect.signature(cls).parameters[name].default


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        many = next((h for h in arguments if typing.get_origin(h) is tuple), None)
        ours = next((h for h in arguments if h in _KIND_OF or dataclasses.is_dataclass(h)), None)
        hint = (many if isinstance(value, list | tuple) else ours) or hint
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _KIND_OF:
        return build(_KIND_OF[hint], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where}: is {value!r}; it must be a table")
        kind = _plugin_name(typing.cast(type, hint))  # a field for this plug-in alone
        if kind is not None and "kind" in value:
            _check_choice(f"{where}.kind", value["kind"], (kind,))
            value = {key: one for key, one in value.items() if key != "kind"}
        start = default if isinstance(default, hint) else None  # type: ignore[arg-type]
        return build_dataclass(hint, value, where, start)
    if origin is tuple and (arguments[0] in _KIND_OF or dataclasses.is_dataclass(arguments[0])):
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: is {value!r}; it must be a list of tables")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise InputError(f"{where} = {value}: is too large; at most {_LARGEST - 1}, say as a seed")
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise InputError(f"{where} = {value!r}: {problem[0].lower()}{problem[1:]}") from error


def describe(value: Any) -> Any:
    """The table that `build` makes `value` from, all settings written out; plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = _plugin_name(type(value))
        return {"kind": kind, **table} if kind else table
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    return value


def contents(value: Any, where: str = "") -> dict[str, str]:
    """Of each setting that names a file or folder: its key, dotted, and a hash of what lies there.

    Whatever reads files says so itself, in a method `contents` that gives this of its own fields.
    """
    found = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if callable(own := getattr(value, "contents", None)):
            found = {f"{where}{name}": digest for name, digest in own().items()}
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple | list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, inner in value.items():
            found |= contents(inner, f"{where}{name}.")
    return found


def _plugin_name(cls: type) -> str | None:
    package, _, module = cls.__module__.rpartition(".")
    if package.removeprefix("trompe.") in KINDS:
        public = getattr(importlib.import_module(cls.__module__), "__all__", ())
        return module if cls.__name__ in public else None
    if cls.__module__.split(".")[0] == "trompe":
        return None
    return f"{cls.__module__}:{cls.__qualname__}"


def _check_choice(what: str, given: str, choices: Any) -> None:
    if given not in choices:
        raise InputError(f"{what} {given!r}: there is none of that name{nearest(given, choices)}")


def nearest(given: str, choices: Any) -> str:
    """The end of an error sentence: the nearest of the known names, or all of them."""
    near = difflib.get_close_matches(given, list(choices), 1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(sorted(choices)) or 'none'}"
