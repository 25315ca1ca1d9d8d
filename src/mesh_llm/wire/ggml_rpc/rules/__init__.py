"""Which operators a graph from another machine may use, and what their tensors must look like.

ggml's kernels trust whoever built the graph. A rule says for one operator all that it may look like, so that its
kernels on the processor backend of the pinned llama.cpp touch nothing outside of the checked tensors, and neither abort
nor divide by zero. An operator without a rule is refused: function pointers (CUSTOM, MAP_CUSTOM*), training, and what
no architecture of llama.cpp uses.
"""

from mesh_llm.wire.ggml_rpc.rules.copies import COPY_RULES
from mesh_llm.wire.ggml_rpc.rules.matrices import MATRIX_RULES
from mesh_llm.wire.ggml_rpc.rules.rule import Rule
from mesh_llm.wire.ggml_rpc.rules.states import STATE_RULES
from mesh_llm.wire.ggml_rpc.rules.vectors import VECTOR_RULES
from mesh_llm.wire.ggml_rpc.tensors import IDLE, OPERATORS

RULES_BY_NAME: dict[str, Rule] = {**VECTOR_RULES, **COPY_RULES, **MATRIX_RULES, **STATE_RULES}
RULES: dict[int, Rule] = {OPERATORS[name]: rule for name, rule in RULES_BY_NAME.items()}
"""By the operator's number."""

ALLOWED = frozenset(RULES) | IDLE
"""All operators that a graph may contain."""
