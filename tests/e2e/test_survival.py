"""An answer outlives the machine that gives it: real nodes, one of which ends in the middle of a stream."""
