"""Round trips as they change, over a network with delays: what election and routing are told."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.netlab.fixtures import NetLabFactory

NODE = """
import asyncio, itertools, sys
import structlog, logging
from mesh_llm.core.types.events import PathChanged, PeerConnected
from mesh_llm.core.types.gossip import Ping
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from tests.integration.net_nodes import PlainCodec

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

def on_event(event):
    if isinstance(event, PeerConnected | PathChanged):
        print("path", event.node, event.rtt_ms, event.relayed, flush=True)

async def main():
    settings = EndpointSettings(relay=False)
    limits = NetLimits(sample_period=0.2)
    config = MeshNetConfig(home=None, tokens=tuple(sys.argv[1:]), endpoint=settings, limits=limits)
    node = MeshNet(config, SigningKey.generate(), PlainCodec(), on_event)
    await node.start()
    print("token", node.invite_book.token(), *node.reachable().addresses, flush=True)
    if sys.argv[1:]:
        (await node.joiner.join()).raise_for_user()
    for nonce in itertools.count():
        # A round trip is known by traffic, of which membership makes enough.
        for connection in node.connections:
            node.send(connection.peer.node, Ping(nonce=nonce))
        await asyncio.sleep(0.05)

asyncio.run(main())
"""


def lines(process: "subprocess.Popen[str]", word: str) -> Iterator[list[str]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            yield line.split()
    raise AssertionError("the node ended")


@pytest.mark.timeout(90)
def test_a_slower_link_is_told_and_addresses_are_those_of_the_network(netlab: NetLabFactory):
    lab = netlab(2, delay_ms=5)
    with ExitStack() as processes:
        command = [sys.executable, "-c", NODE]
        first = processes.enter_context(lab.popen(0, command, stdout=subprocess.PIPE, text=True))
        _, token, *addresses = next(lines(first, "token"))
        assert [address.rpartition(":")[0] for address in addresses] == [lab.addr(0)]
        second = processes.enter_context(lab.popen(1, [*command, token], stdout=subprocess.PIPE, text=True))
        paths = lines(second, "path")
        _, _, rtt, relayed = next(paths)
        # The first sample can be long, on a machine that has other work; none can be shorter than the way.
        while float(rtt) > 60:
            _, _, rtt, relayed = next(paths)
        assert float(rtt) >= 8
        assert relayed == "False"
        lab.link(0, 1).set(delay_ms=60)
        # A round trip is told again where it differs by a quarter: from 97 ms on, 120 ms need not be told any more.
        while not 97 <= float(rtt) <= 200:
            _, _, rtt, _ = next(paths)
        for process in (first, second):
            process.kill()
