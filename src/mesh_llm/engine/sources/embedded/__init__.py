"""llama.cpp out of the pinned xllamacpp wheel, run as child processes; its RPC backend is a plugin compiled once."""
