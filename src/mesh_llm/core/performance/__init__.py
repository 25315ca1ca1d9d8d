"""How fast a model is: speeds, calibration, predictions, plans."""
