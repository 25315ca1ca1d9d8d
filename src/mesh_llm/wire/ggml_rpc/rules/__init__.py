"""The firewall's rules: the ggml operators that a graph from another machine may use, and how their tensors must be.

ggml's kernels trust the builder of a graph. A rule describes all that one operator may look like. Then its kernels in
the CPU backend of the pinned llama.cpp touch nothing outside of the checked tensors, do not abort, and do not divide
by zero. An operator without a rule is refused: function pointers (CUSTOM, MAP_CUSTOM*), training, and operators that
no architecture of llama.cpp uses.

To add an operator:

1. Give it its number in `tensors.OPERATORS`, if it has none there (order of `enum ggml_op`).
2. Read its kernels in ggml/src/ggml-cpu, and what `ggml_graph_plan` reserves for it. Write a `Rule` (see `rule`) into
   the table of its family: `vectors` (element by element, or row by row), `copies` (moves elements), `matrices`
   (products, look-ups, attention), `states` (recurrent models, single architectures). Name all kernels that you read.
3. Run `make rpc-kernels ARGS=--write`: it writes the digests of the kernels, and docs/firewall.md.
4. Add graphs that use it to `tests/oracle/operators.py`: `make fuzz` computes what the rule accepts under sanitizers.
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
"""The numbers of all operators that a graph may contain."""

SERVER = tuple(
    f"ggml-rpc/ggml-rpc.cpp:rpc_server::{name}"
    for name in (
        *("deserialize_tensor", "create_node", "graph_compute", "graph_recompute", "get_alloc_size", "alloc_buffer"),
        *("buffer_get_base", "free_buffer", "buffer_clear", "memset_tensor", "set_tensor", "set_tensor_2d"),
        *("init_tensor", "get_tensor", "get_tensor_2d", "copy_tensor"),
    )
)
"""How the rpc-server reads requests, and what it checks."""

BACKEND = (
    *(
        f"ggml-cpu/ggml-cpu.c:{name}"
        for name in (
            *("type_traits_cpu", "ggml_graph_plan", "ggml_get_n_tasks", "ggml_compute_forward"),
            *("ggml_graph_compute_thread", "ggml_cpu_try_fuse_ops"),
        )
    ),
    *(
        f"ggml.c:{name}"
        for name in (
            *("type_traits", "ggml_new_tensor_impl", "ggml_nbytes", "ggml_row_size", "ggml_is_contiguous_m_n"),
            *("ggml_can_repeat", "ggml_rope_yarn_corr_dims"),
        )
    ),
    "ggml-impl.h:ggml_can_fuse_ext",
    "ggml-impl.h:ggml_node_has_n_uses",
    "ggml-cpu/common.h:get_thread_range",
    "ggml-cpu/traits.cpp:*",
    "ggml-backend.cpp:ggml_backend_cpu_buffer_i",
    "ggml-backend.cpp:ggml_backend_cpu_buffer_cpy_tensor",
)
"""How a graph is planned and computed, and the functions of each type."""

VECTORS = (
    *("ggml-cpu/vec.h:*", "ggml-cpu/vec.cpp:*", "ggml-cpu/simd-mappings.h:*", "ggml-cpu/simd-gemm.h:*"),
    *("ggml-cpu/quants.c:*", "ggml-cpu/arch/x86/quants.c:*", "ggml-cpu/arch/arm/quants.c:*", "ggml-quants.c:*"),
    *("ggml-cpu/tiled/tiled.cpp:*", "ggml-cpu/tiled/tiled-kernel.cpp:*", "ggml-cpu/tiled/tiled-kernel.h:*"),
    "ggml-cpu/llamafile/sgemm.cpp:*",
)
"""Functions that kernels call for a row or a block of a given length: they must touch no more than that."""


def sources() -> tuple[str, ...]:
    """All functions that the rules depend on, sorted: a change there may change what a rule must check.

    Names are `file:function`, or `file:*` for all of a file, below ggml/src of llama.cpp. tests/data/rpc_kernels.json
    holds the digest of each in the pinned release; tools/rpc_kernels.py writes and compares them.
    """
    kernels = (kernel for rule in RULES_BY_NAME.values() for kernel in rule.kernels)
    return tuple(sorted({*kernels, *SERVER, *BACKEND, *VECTORS}))
