"""Renders a chat template for another process; a script that needs only Jinja.

A checkpoint's template is a program that nobody has read. Here it runs in Jinja's sandbox, and in a
process that the system ends when it takes too much: no list of dangerous constructs is complete.

Requests and replies are lines of JSON. The first request has the `source`, its reply says whether
that compiles; the others have `chats`, the template's variables of each. Their replies have for
each its `text`, or an `error`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Json = dict[str, Any]

MAX_MEMORY_BYTES = 1 << 30
MAX_CHARS = 1 << 24
# What compiling and running a template can raise.
FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)


class _GenerationTag(Extension):
    """`{% generation %}`: transformers marks with it what the model itself has said."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """A block that is its body, with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of templates: not the type itself, whose attributes lead further."""

    def __call__(self, *args: Any, **kwargs: Any) -> Json:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> Json:
        """As Python's."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of templates; no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a legal name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def compile_template(source: str) -> Template:
    """The template in the world that transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def _join(parts: Iterable[str]) -> str:
    """The parts as one text.

    Raises:
        ValueError: it is too long.
    """
    found, num_chars = [], 0
    for part in parts:
        found.append(part)
        num_chars += len(part)
        if num_chars > MAX_CHARS:
            raise ValueError(f"its text is longer than {MAX_CHARS} characters")
    return "".join(found)


def _try(work: Callable[[], Json], max_cpu_s: float) -> Json:
    """The reply, or what went wrong; this process ends if it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
    try:
        return work()
    except FAULTS as error:
        return {"error": str(error) or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(max_cpu_s: float) -> None:
    """Compile the source, then answer requests until there are no more."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, hard))
    templates: list[Template] = []

    def render(variables: Json) -> Json:
        return {"text": _join(templates[0].generate(variables))}

    def answer(line: str) -> Json:
        request = json.loads(line)
        if not templates:
            templates.append(compile_template(request["source"]))
            return {}
        return {"chats": [_try(partial(render, chat), max_cpu_s) for chat in request["chats"]]}

    for line in sys.stdin:
        reply = _try(partial(answer, line), max_cpu_s)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
