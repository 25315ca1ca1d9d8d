"""Several hosts on one machine: network namespaces joined by links with delay, loss, rate and cuts.

Start at `tests.netlab.lab.NetLab`, or the `netlab` fixture of `tests.netlab.fixtures`. Needs Linux, root (real, or of
a user namespace) and /dev/net/tun, and nothing else: no tc, no netem, no iproute2, no mount, and no name that could
clash or be left behind.
"""
