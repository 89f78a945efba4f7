"""A model's chat template, rendered in Jinja's sandbox: checkpoints are not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenspeed_plan.plans.errors import PlanError, RequestError

_HINT = "mend the messages, or use `/v1/completions`"


class _Lenient(Undefined):
    """An undefined name: published templates test for it; printing it is an error."""

    __str__ = StrictUndefined.__str__


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Lenient,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


class ChatTemplate:
    """Chat messages -> text of a prompt that ends where the assistant's answer begins.

    Raises:
        PlanError: the template cannot be parsed.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str | None] | None = None) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise PlanError(
                f"the model's chat template does not parse: {error}",
                "use the file of the published model",
            ) from error
        self._tokens = {name: token or "" for name, token in (special_tokens or {}).items()}

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder: `chat_template.jinja`, else `tokenizer_config.json`'s.

        Returns:
            None if the model has no template.

        Raises:
            PlanError: a file is not UTF-8 or not JSON, or the template cannot be parsed.
        """
        config = _tokenizer_config(folder)
        source = config.get("chat_template")
        path = folder / "chat_template.jinja"
        if path.is_file():
            source = _read_template(path)
        if not isinstance(source, str):
            return None
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: config[name] for name in names if isinstance(config.get(name), str)}
        return cls(source, tokens)

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render messages as a prompt.

        Raises:
            RequestError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._tokens
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error}", _HINT
            ) from error


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"`{path}` is not UTF-8", "use the file of the published model") from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(
            f"`{path}` is not JSON: {error}", "use the file of the published model"
        ) from error
    if isinstance(data, dict):
        return data
    return {}
