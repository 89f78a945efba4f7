"""Chat templates render as in transformers, in bounds of time and memory, and fail alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from chat_models import JSON_TEMPLATE, TAGS_TEMPLATE, tool
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_edits import added, copy_tokenizer, edit_json

from tokenspeed_plan.codegen import chat_template
from tokenspeed_plan.codegen.chat_template import ChatTemplate
from tokenspeed_plan.plans.errors import PlanError, RequestError, TokenspeedError

USER = {"role": "user", "content": "hi é \u0301 <|im_end|>"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be\nbrief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "x"},
    {"role": "assistant", "content": "ok", "reasoning": "hm", "name": None},
]
TEMPLATES = {
    "trimmed blocks": "  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ mask_token }}",
    "generation": "{% for m in messages %}{% set x = m.role %}{% generation %}{{ x }}"
    "{% set y = 1 %}{% endgeneration %}{{ y }}{% endfor %}",
    "generation, trimmed": "{%- for m in messages -%} {%- generation -%} {{ m.role }} "
    "{%- endgeneration -%} {%- endfor -%}",
    "JSON": "{{ messages | tojson }}{{ 'é<' | tojson(ensure_ascii=true) }}"
    "{{ {'b': 1, 'a': [1]} | tojson(indent=2, sort_keys=true) }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %}",
    "namespaces": "{% set ns = namespace(a=1, self=2) %}{% for m in messages %}"
    "{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}{{ dict(a=1).a }}{{ dict.fromkeys('ab') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "null": "{% for m in messages %}{{ 'content' in m }}{{ m.name is defined }}{{ m.content }}"
    "{% endfor %}{{ tools }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing }}",
    "a year": "{{ strftime_now('%Y') | length }}",
    "slices": "{{ messages[::-1][0].role }}{{ messages[0].content.split('\n')[-1].strip('.') }}",
}
REFUSED = {
    "its own word": "{{ raise_exception('no!') }}",
    "no number": "{{ 1 // 0 }}",
    "no such field": "{{ messages[0].a.b }}",
    "a private name": "{{ namespace(_a=1) }}",
    "too deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too long": "{% for i in range(99) %}{{ 'a' * messages | length * 500000 }}{% endfor %}",
    "too much": "{{ 'a' * (messages | length * 10 ** 9) }}",
    "no type": "{{ messages + 1 }}",
    "no character": "{{ '%c' % (messages | length + 1114111) }}",
    "no attribute": "{{ ().__class__.__bases__[0].__subclasses__() }}",
}
NO_END = {
    "power": "{% set n = messages | length * 0 + 9 %}{{ n ** (n ** n) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ lipsum(n=10 ** 9) }}",
}
UNCOMPILED = {
    "no end": "{% if x %}",
    "outside a loop": "{% break %}",
    "a long number": "{{ " + "1" * 5000 + " }}",
    "too deep": "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "an unknown filter": "{{ 1 | nothing }}",
}


def write(folder: Path, source: str) -> Path:
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


def theirs(folder: Path, messages: list[dict[str, Any]]) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def ours(folder: Path, messages: list[dict[str, Any]]) -> str:
    template = ChatTemplate.load(folder)
    assert template
    return template(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str, tmp_path: Path) -> None:
    folder = write(copy_tokenizer(tmp_path / "model"), TEMPLATES[name])
    text = ours(folder, MESSAGES)
    assert text == theirs(folder, MESSAGES) and text.strip()


WORDS = ("{{ m.role }}", "{{ m.content }}", "{{ m.tool_calls | tojson }}", "{{ loop.index }}")
WORDS += ("{% if m.content %}", "{% endif %}", "{% for m in messages %}", "{% endfor %}", "\n", " ")
WORDS += ("{%- if loop.last -%}", "{% else %}", "{% set m = 1 %}", "{{ eos_token }}", "{% break %}")
WORDS += ("{% generation %}", "{% endgeneration %}", "<|im_start|>", "{{ m | upper }}", "{# x #}")
WORDS += ("{% macro f(m) %}", "{% endmacro %}", "{{ f(1) }}", "{{ m.content * 3 }}", "{{ '", "' }}")
PARTS = st.lists(st.sampled_from(WORDS), max_size=8)
LOOP = PARTS.map(lambda parts: "{% for m in messages %}" + "".join(parts) + "{% endfor %}")


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(source=LOOP | PARTS.map("".join))
def test_any_template_renders_as_in_transformers_or_is_refused(
    source: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write(copy_tokenizer(tmp_path_factory.mktemp("template") / "model"), source)
    try:
        text = ours(folder, MESSAGES)
    except TokenspeedError as error:
        assert error.hint and "\n" not in error.message
    else:
        assert text == theirs(folder, MESSAGES)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_refuses_the_messages(name: str) -> None:
    good = "{% if messages | length == 1 %}good{% else %}" + REFUSED[name] + "{% endif %}"
    template = ChatTemplate(good)
    for _ in range(2):
        with pytest.raises(RequestError, match="chat template refuses the messages"):
            template(MESSAGES)
        assert template([USER]) == "good", "the next request is answered"


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_END)
def test_a_template_without_end_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CPU_S", 0.5)
    template = ChatTemplate(
        "{% if messages | length == 1 %}good{% else %}" + NO_END[name] + "{% endif %}"
    )
    with pytest.raises(RequestError, match="does not come to an end"):
        template(MESSAGES)
    assert template([USER]) == "good", "the next request is answered"


@pytest.mark.parametrize("name", UNCOMPILED)
def test_a_template_that_does_not_compile(name: str) -> None:
    with pytest.raises(PlanError, match="does not compile"):
        ChatTemplate(UNCOMPILED[name])


@pytest.mark.slow
def test_compiling_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CPU_S", 0.5)
    with pytest.raises(PlanError, match="does not come to an end"):
        ChatTemplate("{{ 9 ** (9 ** 9) }}")


def in_config(value: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", lambda data: data.update(chat_template=value))

    return change


def in_folder(*names: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        for name in names:
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.write_text(f"{name} {{{{ eos_token }}}}", encoding="utf-8")

    return change


PLACES: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: write(folder, "file"),
    "the config": in_config("config {{ eos_token }}"),
    "a list": in_config(
        [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    ),
    "a dict": in_config({"default": "D", "tool_use": "T"}),
    "files": in_folder("tool_use", "rag"),
    "a file that replaces the file": in_folder("default"),
    "an object": lambda folder: edit_json(
        write(folder, "{{ eos_token }}") / "tokenizer_config.json",
        lambda data: data.update(eos_token=added("<|im_end|>") | {"__type": "AddedToken"}),
    ),
    "a token of the model": lambda folder: edit_json(
        write(folder, "{{ image_token }}") / "tokenizer_config.json",
        lambda data: data.update(extra_special_tokens={"image_token": "<|image_pad|>"}),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_templates_are_found_where_transformers_finds_them(name: str, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    PLACES[name](folder)
    assert ours(folder, [USER]) == theirs(folder, [USER]) != ""


@pytest.mark.parametrize(
    "change",
    [in_config(None), in_config([{"name": "tool_use", "template": "T"}]), in_config({})],
    ids=["nothing", "another name", "no name"],
)
def test_a_model_may_have_none(change: Callable[[Path], object], tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    change(folder)
    assert ChatTemplate.load(folder) is None
    with pytest.raises(ValueError, match="template"):
        theirs(folder, [USER])


def test_a_processors_template_counts_where_there_is_no_other(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    (folder / "chat_template.json").write_text('{"chat_template": "P"}', encoding="utf-8")
    assert ours(folder, [USER]) != "P"
    (folder / "chat_template.jinja").unlink()
    assert ours(folder, [USER]) == "P"


@pytest.mark.parametrize("value", [5, [5], [{"name": "default"}], {"default": 5}, True])
def test_a_template_that_is_no_text(value: Any, tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    in_config(value)(folder)
    with pytest.raises(PlanError, match=r"tokenizer_config\.json"):
        ChatTemplate.load(folder)


@pytest.mark.parametrize(
    "source", [TAGS_TEMPLATE, JSON_TEMPLATE, "{{ tools }}{{ a }}{{ eos_token }}"]
)
def test_tools_and_variables_are_shown_as_in_transformers(source: str, tmp_path: Path) -> None:
    folder = write(copy_tokenizer(tmp_path / "model"), source)
    tools = [tool("f", {"a": {"type": "string"}}, required=["a"]) | {"more": [1, None]}]
    variables = {"a": "é", "enable_thinking": False}
    messages = [USER, {"role": "assistant", "content": "x", "tool_calls": [CALL]}, USER]
    template = ChatTemplate.load(folder)
    assert template
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for shown in (tools, None):
        wanted = tokenizer.apply_chat_template(
            messages, tools=shown, tokenize=False, add_generation_prompt=True, **variables
        )
        assert template(messages, shown, variables) == wanted


def test_a_chat_with_tools_has_its_own_template(tmp_path: Path) -> None:
    folder = copy_tokenizer(tmp_path / "model")
    in_config({"default": "D", "tool_use": "T"})(folder)
    template = ChatTemplate.load(folder)
    assert template
    assert (template([USER]), template([USER], [tool("f", {})])) == ("D", "T")


def call(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    if arguments is ...:
        del function["arguments"]
    return [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]


CALLS = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"


@pytest.mark.parametrize("arguments", [{"a": 1, "é": [None, True]}, {}, {"a": {"b": "{}"}}])
def test_arguments_as_text_are_those_as_an_object(arguments: Any, tmp_path: Path) -> None:
    folder = write(copy_tokenizer(tmp_path / "model"), CALLS)
    assert ours(folder, call(json.dumps(arguments))) == theirs(folder, call(arguments))


@pytest.mark.parametrize("arguments", ["", None, ...])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    template = ChatTemplate(CALLS)
    assert template(call(arguments)) == '[{"function": {"name": "f", "arguments": {}}}]'


@pytest.mark.parametrize("arguments", ["{", "5", "[1]", "null", [1], 5, "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(RequestError, match=r"arguments in messages\[1\].tool_calls are not"):
        ChatTemplate(CALLS)(call(arguments))


def test_nothing_of_the_current_folder_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2.py", "json.py", "datetime.py"):
        (tmp_path / name).write_text("raise SystemExit(3)", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplate("good")([USER]) == "good"


def test_a_process_that_was_killed_is_started_again() -> None:
    template = ChatTemplate("good")
    template._renderer._process._process.kill()
    with pytest.raises(RequestError, match="ended with code -9"):
        template([USER])
    assert template([USER]) == "good"


def test_the_process_ends_with_its_template() -> None:
    template = ChatTemplate("good")
    process = template._renderer._process._process
    assert process.poll() is None
    del template
    assert process.poll() is not None
