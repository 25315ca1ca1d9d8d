"""Where a request goes: the routing table, ranking, circuit breakers, model names."""
