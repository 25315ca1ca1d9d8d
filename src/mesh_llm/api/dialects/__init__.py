"""Where llama.cpp falls short of the vendors' APIs, the asker's own node corrects it: one module for each dialect.

A module turns a client's request into one that the engine understands, and the engine's answer into what the vendor
documents. Corrections are made where the client's bytes leave, behind the resuming of streams: between nodes, and in
what is kept to resume an answer, everything is as the engine gave it. What needs no correction is not parsed.

`ollama/` is another server's API as a whole: its paths become requests to the paths above.
"""
