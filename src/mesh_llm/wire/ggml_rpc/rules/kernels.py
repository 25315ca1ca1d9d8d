"""What the rules were read from, beside each operator's own kernels: a change there may change what a rule must ask.

Names are `file:function` or `file:*` for all of a file, below ggml/src of llama.cpp. tests/data/rpc_kernels.json has
the digest of each in the pinned release; tools/rpc_kernels.py compares and writes it.
"""

from mesh_llm.wire.ggml_rpc.rules import RULES_BY_NAME

SERVER = tuple(
    f"ggml-rpc/ggml-rpc.cpp:rpc_server::{name}"
    for name in (
        *("deserialize_tensor", "create_node", "graph_compute", "graph_recompute", "get_alloc_size", "alloc_buffer"),
        *("buffer_get_base", "free_buffer", "buffer_clear", "memset_tensor", "set_tensor", "set_tensor_2d"),
        *("init_tensor", "get_tensor", "get_tensor_2d", "copy_tensor"),
    )
)
"""How the rpc-server reads requests, and what it checks itself."""

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
"""How a graph is planned and computed, and which functions types have."""

VECTORS = (
    *("ggml-cpu/vec.h:*", "ggml-cpu/vec.cpp:*", "ggml-cpu/simd-mappings.h:*", "ggml-cpu/simd-gemm.h:*"),
    *("ggml-cpu/quants.c:*", "ggml-cpu/arch/x86/quants.c:*", "ggml-cpu/arch/arm/quants.c:*", "ggml-quants.c:*"),
    *("ggml-cpu/tiled/tiled.cpp:*", "ggml-cpu/tiled/tiled-kernel.cpp:*", "ggml-cpu/tiled/tiled-kernel.h:*"),
    "ggml-cpu/llamafile/sgemm.cpp:*",
)
"""What kernels hand a row or a block to, with its length: these must take no more of it than that."""


def read_from() -> tuple[str, ...]:
    """All that the rules were read from, each once, in order."""
    kernels = (kernel for rule in RULES_BY_NAME.values() for kernel in rule.kernels)
    return tuple(sorted({*kernels, *SERVER, *BACKEND, *VECTORS}))
