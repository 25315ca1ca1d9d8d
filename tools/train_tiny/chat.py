"""The chat format: ChatML, as the template in the model's file and as the same rule in Python."""

from __future__ import annotations

import json

from tools.train_tiny.corpus import Conversation, Json, Message

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
DOCUMENT_END = "<|endoftext|>"
SPECIAL_TOKENS = (DOCUMENT_END, TURN_START, TURN_END)

_TOOLS_INTRODUCTION = "You can call these tools:"
_TOOLS_INSTRUCTION = (
    "To call a tool, answer with its name and its arguments:\n"
    '<tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call>'
)

_TOOLS_INSTRUCTION_IN_TEMPLATE = _TOOLS_INSTRUCTION.replace("\n", "\\n").replace('"', '\\"')

CHAT_TEMPLATE = (
    "{%- set first = 0 %}"
    "{%- if messages[0].role == 'system' %}{%- set first = 1 %}{%- endif %}"
    "{%- if tools or first == 1 %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if first == 1 %}{{- messages[0].content }}{%- endif %}"
    "{%- if tools %}"
    "{%- if first == 1 %}{{- '\\n\\n' }}{%- endif %}"
    f'{{{{- "{_TOOLS_INTRODUCTION}\\n<tools>" }}}}'
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    f'{{{{- "\\n</tools>\\n{_TOOLS_INSTRUCTION_IN_TEMPLATE}" }}}}'
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages[first:] %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- if message.tool_calls %}"
    "{%- for call in message.tool_calls %}"
    "{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{%- if call.function.arguments is string %}{{- call.function.arguments }}"
    "{%- else %}{{- call.function.arguments | tojson }}{%- endif %}"
    "{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _turn_text(message: Message) -> str:
    if message.tool_call is None:
        return message.text
    return f"<tool_call>\n{json.dumps(message.tool_call)}\n</tool_call>"


def _tools_text(tools: tuple[Json, ...]) -> str:
    listed = "".join("\n" + json.dumps(tool) for tool in tools)
    return f"{_TOOLS_INTRODUCTION}\n<tools>{listed}\n</tools>\n{_TOOLS_INSTRUCTION}"


def render(conversation: Conversation) -> list[tuple[str, bool]]:
    """The conversation as ChatML, in pieces; the true ones are what the assistant writes itself."""
    messages = list(conversation.messages)
    if conversation.tools:
        system = messages.pop(0).text + "\n\n" if messages and messages[0].role == "system" else ""
        messages.insert(0, Message("system", system + _tools_text(conversation.tools)))
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        pieces.append((f"{TURN_START}{message.role}\n", False))
        if message.role == "assistant":
            pieces += [(_turn_text(message) + TURN_END, True), ("\n", False)]
        else:
            pieces.append((f"{_turn_text(message)}{TURN_END}\n", False))
    return pieces


def prompt(conversation: Conversation) -> str:
    """The conversation as ChatML, open for the assistant's answer."""
    return "".join(text for text, _ in render(conversation)) + f"{TURN_START}assistant\n"
