"""YAML that somebody else wrote: specs, `--set`, profiles and files of engines.

One reader, so that each of them is refused in the same words, with the file and its line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tokenspeed_plan.plans.errors import SpecError
from tokenspeed_plan.plans.text import printable_line, read_utf8

YAML_HINT = "check that line: its indentation, its quotes, its brackets"

MAX_DEPTH = 50  # sections inside of sections
MAX_CHARS = 1 << 20
MAX_NODES = 100_000  # with each alias counted as often as it is used
_MAX_PROBLEM_CHARS = 200
_TOO_DEEP = f"more than {MAX_DEPTH} levels are inside of each other"

# What PyYAML's constructors let through for a tag that does not fit its text.
_MISFITS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)


def read_file(path: Path, hint: str) -> str:
    """The text of a file of the user's.

    Raises:
        SpecError: it cannot be read, or is not UTF-8; with `hint`.
    """
    try:
        return read_utf8(path)
    except OSError as error:
        raise SpecError(f"cannot read `{path}`: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise SpecError(f"cannot read `{path}:{line}`: not UTF-8", hint) from error
    except ValueError as error:  # a path with a NUL
        raise SpecError(f"cannot read `{printable_line(str(path))}`: {error}", hint) from error


def parse_yaml(text: str, name: str, hint: str = YAML_HINT) -> Any:
    """The value of a file's text.

    Raises:
        SpecError: it is not YAML; names the line.
    """
    try:
        return read_yaml(text)
    except NotYaml as error:
        raise SpecError(error.at(name), hint) from error


class NotYaml(Exception):
    """A text is not YAML, or not YAML that is taken here.

    Attributes:
        problem: what is wrong, in one line.
        line: where, counted from 1; None where the whole text is meant.
    """

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line

    def at(self, name: str) -> str:
        """The message for a file or an option of this name."""
        where = name if self.line is None else f"{name}:{self.line}"
        return f"`{where}` is not YAML: {self.problem}"


def read_yaml(text: str) -> Any:
    """The value of one document of safe YAML, in which no key is given twice.

    Raises:
        NotYaml: it is not that, or it is too large or too deep.
    """
    if len(text) > MAX_CHARS:
        raise NotYaml(f"it has {len(text)} characters, the most is {MAX_CHARS}", None)
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        problem = f"the character U+{error.character:04X} is not allowed"
        raise NotYaml(problem, line) from error
    except yaml.MarkedYAMLError as error:
        raise NotYaml(_problem(error), _line(error)) from error
    except (yaml.YAMLError, *_MISFITS) as error:
        raise NotYaml(_in_short(error), None) from error


def _problem(error: yaml.MarkedYAMLError) -> str:
    return _in_short(error.problem or error.context or error)


def _line(error: yaml.MarkedYAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return None
    return int(mark.line) + 1


def _in_short(error: object) -> str:
    """Its text in one short line; the name of its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > _MAX_PROBLEM_CHARS:
        return f"{text[:_MAX_PROBLEM_CHARS]}..."
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML with bounds, whose errors all know their line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # nodes and depth of each finished collection

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node; refuses deep ones before Python's stack ends."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _refusal(_TOO_DEEP, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        """A word; half a surrogate pair, which an escape can spell, is none."""
        node = super().compose_scalar_node(anchor)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refusal("half of a surrogate pair is not a character", node.start_mark)
        return node

    def compose_sequence_node(self, anchor: dict[Any, yaml.Node]) -> yaml.SequenceNode:
        """A sequence of bounded size."""
        node = super().compose_sequence_node(anchor)
        self._measure(node, node.value)
        return node

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """A mapping of bounded size, before `<<` merges others into it."""
        node = super().compose_mapping_node(anchor)
        _check_keys([key for key, _ in node.value])
        self._measure(node, [part for pair in node.value for part in pair])
        return node

    def _measure(self, node: yaml.Node, parts: list[yaml.Node]) -> None:
        """Refuse a collection that aliases make large, deep or endless."""
        nodes, depth = 1, 0
        for part in parts:
            is_open = isinstance(part, yaml.CollectionNode) and id(part) not in self._sizes
            if is_open:
                raise _refusal("an alias names what it is part of", node.start_mark)
            part_nodes, part_depth = self._sizes.get(id(part), (1, 0))
            nodes += part_nodes
            depth = max(depth, part_depth)
        if nodes > MAX_NODES:
            raise _refusal(f"its aliases stand for over {MAX_NODES} values", node.start_mark)
        if depth >= MAX_DEPTH:
            raise _refusal(_TOO_DEEP, node.start_mark)
        self._sizes[id(node)] = (nodes, depth + 1)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a tag that does not fit its text is an error of that line."""
        try:
            return super().construct_object(node, deep)
        except _MISFITS as error:
            kind = node.tag.rpartition(":")[2]
            raise _refusal(f"the value is not of the type `{kind}`", node.start_mark) from error


def _check_keys(keys: list[yaml.Node]) -> None:
    """Refuse a key that is given twice."""
    first: dict[tuple[str, str], int] = {}
    for key in keys:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = (key.tag, key.value)
        if name in first:
            problem = f"`{key.value}` is given twice, first in line {first[name]}"
            raise _refusal(problem, key.start_mark)
        first[name] = key.start_mark.line + 1


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
