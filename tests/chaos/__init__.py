"""Chaos: five real nodes, three models, steady load, and one fault after the other; `python -m tests.chaos`.

`mesh.py` starts the nodes, `questions.py` says what is asked and what an answer must be, `load.py` asks, `faults.py`
breaks things, `watch.py` looks for leaks, `report.py` makes the table of `docs/reliability.md`, `soak.py` is the same
load for long and without faults.
"""
