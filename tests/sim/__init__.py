"""The mesh at work in virtual time. `python -m tests.sim --help` repeats one scenario, with any seed."""
