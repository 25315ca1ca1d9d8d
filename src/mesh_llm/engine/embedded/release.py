"""The one release of xllamacpp that this version of mesh-llm is made for; the project file pins the same."""

PACKAGE = "xllamacpp"

VERSION = "2026.10.11549"

SDIST_SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
"""The source archive's digest, as the registry and the lock file have it: nothing else is ever compiled or run."""

SDIST_NAME = f"{PACKAGE}-{VERSION}.tar.gz"

RPC_VERSION = "8.0.0"
"""The ggml RPC protocol that this release speaks."""
