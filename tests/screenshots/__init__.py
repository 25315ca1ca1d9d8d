"""Pictures of the console's page, of a real mesh: `make screenshots`."""
