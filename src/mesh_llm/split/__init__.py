"""One model over several machines: llama.cpp's RPC client on the host, an rpc-server on each worker, a tunnel between.

The way of one request: the engine connects to a local socket (`host.session`); `host.tunnel` answers what it can,
replaces weights by references (`host.weights`) and copies between workers by handles (`host.transfers`), and sends
the rest over a stream. On the worker, `worker.session` accepts the stream; `worker.tunnel` checks each request with
`firewall.requests` and passes it to the rpc-server. The answer comes back the same way.
"""
