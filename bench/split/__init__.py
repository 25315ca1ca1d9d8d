"""What splitting a model costs: `python -m bench.split --help`."""
