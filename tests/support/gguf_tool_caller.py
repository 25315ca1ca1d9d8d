"""Models of few ideas, for tests of tool calls: one calls a tool, and one is what a coding agent needs.

The vocabulary has each thing to say as one token; whatever comes before, the usual one follows, and after it the turn's
end. A mark at the end of the prompt makes the model say another one: the template decides. It shows tools in the way
of Hermes and Qwen, which llama.cpp recognises, and parses calls of.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tests.support.gguf_vocabulary import END_OF_TEXT, PADDING, TURN_END, build_vocabulary

TOOL, ARGUMENTS = "weather", '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "{TOOL}", "arguments": {ARGUMENTS}}}\n</tool_call>'
_WIDTH = 64
_FEED_FORWARD = 64
_HEADS = 2
_SURE = 30.0

_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nFunction signatures within <tools></tools>:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nReturn each call within <tool_call></tool_call>:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}{{- message.content }}{%- endif %}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}
        {{- '", "arguments": ' }}{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


ANSWER, MADE = "The mesh answers.", "made-by-a-tool"
_COMMAND = f"echo made > {MADE}"
_SHELLS: Mapping[str, Mapping[str, object]] = {
    "<|described|>": {"name": "bash", "arguments": {"command": _COMMAND, "description": "Make a file"}},
    "<|bash|>": {"name": "bash", "arguments": {"command": _COMMAND}},
    "<|Bash|>": {"name": "Bash", "arguments": {"command": _COMMAND, "description": "Make a file"}},
    "<|shell|>": {"name": "run_shell_command", "arguments": {"command": _COMMAND, "is_background": False}},
    "<|exec|>": {"name": "exec_command", "arguments": {"cmd": _COMMAND}},
}
"""What each agent's tool for commands is called with, by the mark that makes the model say it."""

_AGENT_TEMPLATE = """\
{%- set found = namespace(mark='', used=false) %}
{%- for tool in tools or [] %}
    {%- if tool.function.name == 'bash' and tool.function.parameters.properties.description %}
        {%- set found.mark = '<|described|>' %}
    {%- elif tool.function.name == 'bash' %}{%- set found.mark = '<|bash|>' %}
    {%- elif tool.function.name == 'Bash' %}{%- set found.mark = '<|Bash|>' %}
    {%- elif tool.function.name == 'run_shell_command' %}{%- set found.mark = '<|shell|>' %}
    {%- elif tool.function.name == 'exec_command' %}{%- set found.mark = '<|exec|>' %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- set found.used = true %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}{{- (message.content | string)[:400] }}{%- endif %}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}
        {{- '", "arguments": ' }}{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{%- if not found.used %}{{- found.mark }}{%- endif %}
{%- endif %}
"""
"""An agent's own prompt has tens of thousands of tokens: this one keeps the beginnings of messages, and no tools."""


def write_tool_caller(path: Path) -> None:
    """Write the model that calls `weather`, whatever it is asked: about 0.3 MB."""
    _write(path, "tool-caller", _TEMPLATE, CALL, {}, context=4096)


def write_agents_model(path: Path) -> None:
    """Write the model that lets an agent run one command, which makes the file MADE, and then says ANSWER."""
    calls = {mark: f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for mark, call in _SHELLS.items()}
    _write(path, "agents", _AGENT_TEMPLATE, ANSWER, calls, context=131_072)


def _write(path: Path, name: str, template: str, usual: str, marked: Mapping[str, str], *, context: int) -> None:
    """Write a model that says `usual`, or behind a mark what belongs to it, and ends."""
    vocabulary = build_vocabulary()
    letters = {byte: vocabulary.tokens[byte] for byte in range(256)}
    said = ["".join(letters[byte] for byte in text.encode()) for text in (usual, *marked.values())]
    tokens = [*vocabulary.tokens, *said, *marked]
    first, end = len(vocabulary), vocabulary.id_of(TURN_END)
    marks = first + len(said)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [int(gguf.TokenType.NORMAL)] * len(said) + [int(gguf.TokenType.CONTROL)] * len(marked)
    writer.add_token_types([*vocabulary.types, *kinds])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.id_of(END_OF_TEXT))
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(vocabulary.id_of(PADDING))
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    for number, part in enumerate(("pre", "suf", "mid")):
        # Bytes that no text has.
        writer.add_uint32(f"tokenizer.ggml.fim_{part}_token_id", 1 + number)

    # Channel 0 says "a token", channel 1 "something was said", the next ones each a mark; blocks add nothing.
    embedding = np.zeros((len(tokens), _WIDTH), np.float32)
    embedding[:, 0] = 1.0
    embedding[first:marks, 1] = 1.0
    output = np.zeros((len(tokens), _WIDTH), np.float32)
    output[:, 0] = -_SURE
    output[first, :2] = [_SURE, -2 * _SURE]
    output[end, 1] = 2 * _SURE
    for number in range(len(marked)):
        embedding[marks + number, 2 + number] = 1.0
        output[first, 2 + number] = -2 * _SURE
        output[first + 1 + number, 2 + number] = 2 * _SURE
    square = np.zeros((_WIDTH, _WIDTH), np.float32)
    ones = np.ones(_WIDTH, np.float32)
    tensors = {"token_embd": embedding, "output_norm": ones, "output": output}
    tensors |= {f"blk.0.{name}": ones for name in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{name}": np.zeros((_FEED_FORWARD, _WIDTH), np.float32) for name in ("gate", "up")}
    tensors["blk.0.ffn_down"] = np.zeros((_WIDTH, _FEED_FORWARD), np.float32)
    for part, tensor in tensors.items():
        writer.add_tensor(f"{part}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
