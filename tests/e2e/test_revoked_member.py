"""A member is cut off by one command, at once and for good; whoever may not do it hears who may."""

import json

import pytest
from tests.support.fixtures import StartNode
from tests.support.pool import alive, until

pytestmark = pytest.mark.timeout(180)


async def test_a_member_is_cut_off_by_its_name_and_stays_out(start_node: StartNode) -> None:
    alice = await start_node("a", models=["tiny"], arguments=("--name", "alice"))
    token = await alice.invite()
    bob = await start_node("b", join=[token], arguments=("--name", "bob"), ready=False)
    carol = await start_node("c", join=[token], arguments=("--name", "carol"), ready=False)
    await until(alice, alive(2), "seeing both")
    await until(carol, alive(2), "seeing both")
    # Carol did not invite bob, nor did it found the mesh.
    status, text = await carol.cli("invite", "revoke", "bob")
    assert status == 1
    assert "bob was not invited or admitted by it, nor through it" in text
    assert "Type it on alice, which founded the mesh." in text
    status, text = await carol.cli("invite", "revoke", "alice")
    assert (status, "alice founded the mesh: no other node can cut it off" in text) == (1, True), text
    status, text = await alice.cli("invite", "revoke", "dave")
    assert (status, "No invite of this node and no member of the mesh is called 'dave'" in text) == (1, True), text

    status, text = await alice.cli("invite", "revoke", "bob")
    assert (status, text.strip()) == (0, "bob is cut off, in the whole mesh.")
    for node in (alice, carol):
        await until(node, alive(1), "without bob", 30.0)
        assert [peer["name"] for peer in (await node.status())["peers"]] != ["bob"]
    await bob.process.line("This node's admission was revoked", 30.0)
    # Neither its certificate nor the token, which admits others, brings it back.
    await bob.stop()
    await bob.restart(ready=False)
    await bob.process.line("was revoked", 60.0)
    dave = await start_node("d", join=[token], arguments=("--name", "dave"), ready=False)
    await until(alice, alive(2), "seeing dave")
    names = {peer["name"] for peer in (await alice.status())["peers"]}
    assert names == {"carol", "dave"}
    # The founder needs no more than a key of a node that is away.
    await dave.kill()
    status, text = await alice.cli("invite", "revoke", (await alice.status())["node_id"])
    assert (status, "is this node itself" in text) == (1, True), text
    status, text = await alice.cli("invite", "revoke", "77" * 32, "--json")
    assert status == 0, text
    assert json.loads(text) == {"node_id": "77" * 32, "name": "7777777777", "others": [], "final": True}
