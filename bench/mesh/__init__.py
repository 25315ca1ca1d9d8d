"""What the mesh's transport costs, side by side with plain TCP."""
