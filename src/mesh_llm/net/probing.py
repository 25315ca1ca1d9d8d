"""Whether the nodes that invites name can be reached, and how far away they are. Nobody is asked to let us in."""

import asyncio
from collections.abc import Mapping

from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.net.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.identity import SigningKey
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.frames import CloseCode
from mesh_llm.wire.invite import Contact, Invite, unpack_address

MOST_AT_ONCE = 32


async def measure(
    invites: Mapping[MeshId, Invite], settings: EndpointSettings, timeout: float
) -> dict[MeshId, float | None]:
    """Dial the nodes that each invite names, all at once: round trip in ms, None where none answered in time.

    The dialling node has a key of its own for this once: it tells nobody who looks.

    Raises:
        MeshError: no UDP port can be bound.
    """
    if not invites:
        return {}
    endpoint = await Endpoint.bind(SigningKey.generate(), EndpointSettings(relay=settings.relay, host=settings.host))
    try:
        async with TaskScope("probe") as scope:
            chosen = [*invites.items()][:MOST_AT_ONCE]
            tasks = {
                mesh: scope.spawn(_nearest(endpoint, invite.terms.contacts, timeout), mesh[:8])
                for mesh, invite in chosen
            }
            return {mesh: await task for mesh, task in tasks.items()}
    finally:
        await endpoint.close()


async def _nearest(endpoint: Endpoint, contacts: tuple[Contact, ...], timeout: float) -> float | None:
    async with TaskScope("probe-mesh") as scope:
        tasks = [scope.spawn(_round_trip(endpoint, contact, timeout), "contact") for contact in contacts]
        measured: list[float | None] = [await task for task in tasks]
    return min((rtt for rtt in measured if rtt is not None), default=None)


async def _round_trip(endpoint: Endpoint, contact: Contact, timeout: float) -> float | None:
    began = asyncio.get_running_loop().time()
    try:
        addresses = tuple(unpack_address(packed) for packed in contact.addresses)
        connection = await endpoint.connect(NodeId(contact.node.hex()), addresses, contact.relay, timeout)
    except (ConnectionError, ValueError):
        return None
    # The library counts whole milliseconds; the handshake, of about two round trips, bounds it from above.
    shaken = (asyncio.get_running_loop().time() - began) * 1000
    rtt = float(connection.rtt() or 0)
    connection.close(int(CloseCode.GOODBYE), b"only measured")
    return min(rtt, shaken) if rtt else min(1.0, shaken)
