"""The only place that binds the core to the world: events in, effects out, start-up, shutdown."""
