"""Chat templates with tools and thinking, in the two ways to write calls that are known."""

from __future__ import annotations

import json
from typing import Any

_CONTENT = """{%- macro text_of(content) -%}
{%- if content is string %}{{- content }}
{%- elif content is iterable and content is not mapping %}
{%- for part in content %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- endmacro -%}
"""
_HEAD = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- text_of(messages[0].content) + '\\n\\n' }}{%- endif %}
{{- 'Tools:\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + text_of(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if not loop.first %}{{- raise_exception('a system message must come first') }}{%- endif %}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\\n' + text_of(message.content) + '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + text_of(message.content) }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}BEFORE{{- '<think>\\n' }}AFTER
{{- (message.reasoning_content or '') | trim }}
{{- '\\n</think>\\n\\n' + text_of(message.content) | trim }}
{%- for call in message.tool_calls or [] %}
{{- '\\n\\n' if message.content and loop.first else '' if loop.first else '\\n' }}
"""
_TAGS = """{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for name, value in call.function.arguments | items %}
{{- '<parameter=' + name + '>\\n' }}
{{- value if value is string else value | tojson }}
{{- '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
"""
_JSON = """{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
"""
_TAIL = """{%- endfor %}{{- '<|im_end|>\\n' }}
{%- else %}{{- raise_exception('no role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
OPEN
TRIGGER
{%- endif %}"""
_OPEN_IF = "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}"
_OPEN_NEVER = "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '' }}"

# As Qwen3.5 does it: the prompt opens the thought. As Qwen3 does it: the model opens it.
# At TRIGGER a scripted model gets to know what to say; at AGAIN stands what it got for that turn.
_TAGS_HEAD = _HEAD.replace("BEFORE", "").replace("AFTER", "AGAIN")
_JSON_HEAD = _HEAD.replace("BEFORE", "AGAIN").replace("AFTER", "")
TAGS_SCRIPT = _CONTENT + _TAGS_HEAD + _TAGS + _TAIL.replace("OPEN", _OPEN_IF)
JSON_SCRIPT = _CONTENT + _JSON_HEAD + _JSON + _TAIL.replace("OPEN", _OPEN_NEVER)
TAGS_TEMPLATE = TAGS_SCRIPT.replace("TRIGGER", "").replace("AGAIN", "")
JSON_TEMPLATE = JSON_SCRIPT.replace("TRIGGER", "").replace("AGAIN", "")


def tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, **more}
    function = {"name": name, "description": f"does {name}", "parameters": parameters}
    return {"type": "function", "function": function}


def in_tags(name: str, arguments: dict[str, Any]) -> str:
    """A call as the template of tags writes it."""
    values = "".join(
        f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def in_json(name: str, arguments: dict[str, Any]) -> str:
    """A call as the template of JSON writes it."""
    data = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{data}\n</tool_call>"
