"""llama.cpp: what to run, where it comes from, what the machine has, and the processes themselves."""
