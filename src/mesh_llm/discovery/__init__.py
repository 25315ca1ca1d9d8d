"""Finding meshes: on the local network."""
