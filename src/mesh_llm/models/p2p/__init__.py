"""Models from other nodes of the mesh: giving files away by chunks, and gathering them from several at once."""
