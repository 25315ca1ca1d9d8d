"""Several hosts on one machine: network namespaces joined by links with delay, loss, rate and cuts.

Start at `tests.netlab.lab.NetLab`. Needs Linux, root (real, or of a user namespace) and /dev/net/tun, and nothing else:
no tc, no netem, no iproute2, no mount, no name that could clash or be left behind.
"""

from tests.netlab.lab import LinkControl, NetLab, unavailable_reason
from tests.netlab.link import LinkCounters

__all__ = ["LinkControl", "LinkCounters", "NetLab", "unavailable_reason"]
