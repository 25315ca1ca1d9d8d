"""llama.cpp: what to run, where it comes from, what the machine has, and the processes.

`spec` says what to run; a source in `sources` turns that into a command; `supervisor` runs it. `devices` finds out what
the machine has: another kind of accelerator is added there.
"""
