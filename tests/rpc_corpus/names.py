"""The architectures that the wheel's own table names: `python -m tests.rpc_corpus.names` prints them as JSON."""

import ctypes
import json

from mesh_llm.engine.sources.embedded.ggml import library_path

_MOST = 1000


def named() -> list[str]:
    """In the order of `enum llm_arch`, which llama.cpp's table LLM_ARCH_NAMES follows (src/llama-arch.cpp)."""
    path = library_path()
    assert path is not None
    # C++, so by its mangled name: const char * llm_arch_name(llm_arch).
    name_of = ctypes.CDLL(str(path))._Z13llm_arch_name8llm_arch
    name_of.restype = ctypes.c_char_p
    names: list[str] = []
    for number in range(_MOST):
        name = name_of(number).decode()
        if "unknown" in name:
            return names
        names.append(name)
    raise ValueError("the table of architectures has no end")


if __name__ == "__main__":
    print(json.dumps(named()))
