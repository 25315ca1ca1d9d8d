"""A model of two ideas, for tests of tool calls: it calls the tool, and then it ends its turn. It also fills in text.

Its vocabulary has the whole call as one token; whatever comes before, that token follows, and after it the turn's end.
The template shows tools in the way of Hermes and Qwen, which llama.cpp recognises, and parses calls of.
"""

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


def write_tool_caller(path: Path) -> None:
    """Write the model: about 0.3 MB."""
    vocabulary = build_vocabulary()
    letters = {byte: vocabulary.tokens[byte] for byte in range(256)}
    tokens = [*vocabulary.tokens, "".join(letters[byte] for byte in CALL.encode())]
    call, end = len(tokens) - 1, vocabulary.id_of(TURN_END)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tool-caller")
    writer.add_context_length(4096)
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
    writer.add_token_types([*vocabulary.types, int(gguf.TokenType.NORMAL)])
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.id_of(END_OF_TEXT))
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(vocabulary.id_of(PADDING))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_TEMPLATE)
    for number, name in enumerate(("pre", "suf", "mid")):
        # Bytes that no text has.
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", 1 + number)

    # Channel 0 says "a token", channel 1 says "the call"; blocks add nothing.
    embedding = np.zeros((len(tokens), _WIDTH), np.float32)
    embedding[:, 0] = 1.0
    embedding[call, 1] = 1.0
    output = np.zeros((len(tokens), _WIDTH), np.float32)
    output[:, 0] = -_SURE
    output[call] = [_SURE, -2 * _SURE, *([0.0] * (_WIDTH - 2))]
    output[end] = [-_SURE, 2 * _SURE, *([0.0] * (_WIDTH - 2))]
    square = np.zeros((_WIDTH, _WIDTH), np.float32)
    ones = np.ones(_WIDTH, np.float32)
    tensors = {"token_embd": embedding, "output_norm": ones, "output": output}
    tensors |= {f"blk.0.{name}": ones for name in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}
    tensors |= {f"blk.0.ffn_{name}": np.zeros((_FEED_FORWARD, _WIDTH), np.float32) for name in ("gate", "up")}
    tensors["blk.0.ffn_down"] = np.zeros((_WIDTH, _FEED_FORWARD), np.float32)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
