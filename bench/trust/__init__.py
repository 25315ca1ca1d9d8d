"""How surely a host that serves another model is found, and how rarely an honest one is accused."""
