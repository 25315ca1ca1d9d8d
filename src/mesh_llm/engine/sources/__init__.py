"""Where llama.cpp comes from: the embedded wheel, or programs of the user."""
