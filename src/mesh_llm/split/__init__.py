"""A model split over machines: the tunnel between llama.cpp's RPC client on the host and RPC servers on the workers."""
