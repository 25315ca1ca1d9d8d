"""What the mesh decides. Pure: no clock, socket, file, log or random; time and chance are arguments."""
