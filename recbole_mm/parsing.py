"""Reading settings: YAML files, command-line words and strings to typed values, without ever evaluating code."""

import ast
import re
from pathlib import Path
from typing import Any

import yaml

from recbole_mm.errors import UserError, nearest

#: floats as people write them; plain YAML 1.1 reads 1e-4 as a string
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


_MAX_BYTES = 4 << 20  # of a settings file
_MAX_VALUES = 100_000  # in a settings file, aliases written out


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader with 1e-4 as a number, ``None`` as null, and duplicate keys refused."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice (again in line {line})", key_node.start_mark
                )
            if isinstance(key, (str, int, float)):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# resolvers are tried in order by first character: ours must come before SafeLoader's, whose float is the YAML 1.1 one
SettingsLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a settings file: a mapping of keys to values.

    Raises:
        UserError: when the file is missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES >> 20} MiB ({path.stat().st_size:,} bytes); this is no settings file.")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"The settings file {path} does not exist (looked from {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got a byte that is not at position {error.start}. Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    try:
        value = yaml.load(text, Loader=SettingsLoader)  # noqa: S506 -- SettingsLoader is a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if _written_out(value, {}) > _MAX_VALUES:
        raise UserError(
            f"{path}: its aliases (*name) stand for more than {_MAX_VALUES:,} values when written out. Write the values themselves."
        )
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(
            f"{path}: expected lines of the form `key: value`, got {'a ' + type(value).__name__ if not isinstance(value, dict) else 'keys that are no words'}."
        )
    return value


def _written_out(value: Any, known: dict[int, float]) -> float:
    """How many values `value` holds if each is counted wherever it stands: nine aliases of nine aliases ... fill any memory when printed."""
    if not isinstance(value, (list, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # of itself
        known[id(value)] = 1 + sum(_written_out(part, known) for part in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def parse_value(text: str) -> Any:
    """Turn a word of the command line into a value: YAML first (numbers, lists, mappings, true/null), Python literals such as tuples next.

    >>> parse_value("1e-4"), parse_value("[10, 20]"), parse_value("{'LS': 'valid_and_test'}"), parse_value("(1, 2)"), parse_value("a b")
    (0.0001, [10, 20], {'LS': 'valid_and_test'}, [1, 2], 'a b')
    """
    if text.strip() == "":
        return text
    if text.lstrip()[0] == "(":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        return list(value) if isinstance(value, tuple) else value
    try:
        value = yaml.load(text, Loader=SettingsLoader)  # noqa: S506 -- SettingsLoader is a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    return text if isinstance(value, dict) and text.lstrip()[0] != "{" else value  # "a: b" is a sentence, not a mapping


def parse_arguments(arguments: list[str]) -> dict[str, Any]:
    """Read ``--key=value``, ``--key value``, ``--key v1 v2`` (a list) and ``--flag`` (true) into a dict of raw strings, lists and True.

    Raises:
        UserError: for a word that belongs to no key, or a key given twice with different values.
    """
    settings: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"Expected --key=value on the command line, got {word!r}. Write values with blanks in quotes.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            values = []
            while position < len(arguments) and not arguments[position].startswith("--"):
                values.append(arguments[position])
                position += 1
            value = True if not values else values[0] if len(values) == 1 else values
        key = key.replace("-", "_")
        if key in settings and settings[key] != value:
            raise UserError(f"--{key} stands twice on the command line, with {settings[key]!r} and {value!r}; keep one.")
        settings[key] = value
    return settings


def coerce(key: str, value: Any, default: Any, origin: str) -> Any:
    """Give `value` the type of the key's `default`, or say what was expected.

    None is always allowed (RecBole uses it for "off"); without a default every value is. A scalar becomes a one-element list where a
    list is the default, and ``a,b`` a list.

    Raises:
        UserError: when the value cannot have that type.
    """
    wants_text = isinstance(default, str)
    if isinstance(value, str) and not wants_text:
        value = parse_value(value)
    elif isinstance(value, list) and all(isinstance(v, str) for v in value) and (default is None or isinstance(default, list)):
        value = [parse_value(v) for v in value]
    if isinstance(value, tuple):
        value = list(value)
    if value is None or default is None:
        return value

    def wrong(expected: str) -> UserError:
        return UserError(f"{key}: expected {expected} (default {default!r}), got {value!r} from {origin}.")

    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise wrong("true or false")
    elif isinstance(default, int):
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, (list, dict)) and key in ("topk",):
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("a whole number")
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong("a number")
        return float(value)
    elif isinstance(default, list):
        if isinstance(value, str):
            value = [parse_value(part.strip()) for part in value.split(",") if part.strip()]
        if isinstance(value, dict):
            raise wrong("a list")
        return value if isinstance(value, list) else [value]
    elif isinstance(default, dict):
        if isinstance(value, str) and value == "none":
            return None
        if not isinstance(value, dict):
            raise wrong("a mapping such as {'key': value}")
    elif wants_text:
        if isinstance(value, str):
            return value if value not in ("None", "null", "~") else None
        if isinstance(value, (bool, list, dict)):
            raise wrong("text")
        return str(value)
    return value


def parse_options(arguments: list[str], defaults: dict[str, Any], program: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the options of a command: those in `defaults`, typed like their default (None: any type).

    Raises:
        UserError: for an unknown option, a wrong type, or a missing one of `required`.
    """
    given = parse_arguments(arguments)
    for key in given:
        if key not in defaults:
            known = ", ".join(f"--{name}" for name in defaults)
            raise UserError(f"{program}: unknown option --{key}.{nearest(key, defaults)} It takes {known}.")
    options = {**defaults, **{key: coerce(key, value, defaults[key], "the command line") for key, value in given.items()}}
    missing = [f"--{key}" for key in required if options[key] in (None, "")]
    if missing:
        raise UserError(f"{program} needs {', '.join(missing)}.")
    return options
