"""Real certificate issuers against a model that knows no certificates: both name the same members.

The model keeps one record for each admission: the node, the invite, the admitting node, and the end. A record rests on
the record of the inviter and on that of the admitting node. It is valid until its end, unless a node with the right to
do so revoked something that it rests on. Every node gets every revocation, and all clocks agree.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.net.members import START, Member, read

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.admission.handshake import CLIENT_LIFETIME, MEMBER_LIFETIME
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Refused, Scope
from mesh_llm.wire.mesh.certificates import MAX_DEPTH, Certificate, issue_certificate, rests_on
from mesh_llm.wire.mesh.invites import Revocation, RevocationKind, revoke

DAY = 86400
SCOPES = st.sampled_from([Scope.SPLIT, Scope.SPLIT, Scope.SERVE, Scope.SERVE, Scope.CLIENT])
WHO = st.integers(0, 8)
REVOKER = st.integers(-1, 8).map(lambda number: None if number < 0 else number)
"""None: the mesh's own key."""
MOST_NODES = 8
KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, MOST_NODES + 1)]
WORTH = DAY
MESH = "mesh"


@dataclass
class Record:
    """One admission, as the model sees it."""

    node: str
    scope: Scope
    expires: float
    depth: int
    invite: str = ""
    below: tuple["Record", ...] = ()
    inviter: str = MESH

    def stands_on(self) -> set[str]:
        names = {self.node, self.invite, self.inviter} - {"", MESH}
        return names.union(*(record.stands_on() for record in self.below))


@dataclass
class Ticket:
    """One invite, as the model sees it. `record`: the issuer's admission when it was made; None: the mesh's key."""

    name: str
    issuer: str
    scope: Scope
    expires: float
    record: Record | None
    token: str
    nonce: bytes = b""
    shown: set[str] = field(default_factory=set[str])

    def stands_on(self) -> set[str]:
        return {self.name, self.issuer} | (self.record.stands_on() if self.record else set())


class Model:
    def __init__(self) -> None:
        self.now = START
        self.records: dict[str, Record] = {}
        self.taken: set[tuple[str, str]] = set()
        """(what, by whom)"""

    def taken_back(self, names: set[str]) -> bool:
        return any(what in names and (by == MESH or by in names) for what, by in self.taken)

    def holds(self, record: Record | None) -> bool:
        return record is not None and record.expires > self.now and not self.taken_back(record.stands_on())

    def lifetime(self, scope: Scope) -> float:
        return CLIENT_LIFETIME if scope is Scope.CLIENT else MEMBER_LIFETIME

    def admission(self, node: str, ticket: Ticket, by: str) -> Record | None:
        """What a ticket gives to a node that has nothing, at the door of `by`."""
        door = self.records.get(by)
        if door is None or not self.holds(door) or door.scope < Scope.SERVE or door.depth >= MAX_DEPTH:
            return None
        if ticket.expires <= self.now or self.taken_back(ticket.stands_on()):
            return None
        if ticket.record is not None and ticket.record.expires <= self.now:
            return None
        if ticket.scope > door.scope or node in ticket.stands_on() or node in door.stands_on():
            return None
        until = [self.now + self.lifetime(ticket.scope), door.expires]
        if ticket.record is not None and ticket.issuer != by:
            until.append(ticket.record.expires)
        issued_by = () if ticket.record is None or ticket.issuer == by else (ticket.record,)
        record = Record(
            node, ticket.scope, int(min(until)), door.depth + 1, ticket.name, (door, *issued_by), ticket.issuer
        )
        return None if self.taken_back(record.stands_on()) else record

    def renewal(self, held: Record, by: str) -> Record | None:
        """What a node that is in gets from another one when half of its time is over."""
        door, inviter = self.records.get(by), self.records.get(held.inviter)
        lifetime = self.lifetime(held.scope)
        if held.expires - self.now > lifetime / 2 or by not in held.stands_on() or door is None or inviter is None:
            return None
        if not self.holds(door) or not self.holds(inviter) or door.scope < held.scope or door.depth >= MAX_DEPTH:
            return None
        if held.node in door.stands_on():
            return None
        until = int(min(self.now + lifetime, door.expires, inviter.expires))
        if until < held.expires + WORTH:
            return None
        fresh = Record(held.node, held.scope, until, door.depth + 1, held.invite, (door, *held.below), held.inviter)
        return None if self.taken_back(fresh.stands_on()) else fresh


class Mesh(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        founder = Member(key=KEYS[0])
        founder.known = self.certificate_of
        self.members: dict[str, Member] = {"n0": founder}
        assert founder.standing.certificate is not None
        self.model.records["n0"] = Record("n0", Scope.SPLIT, founder.standing.certificate.expires, 1)
        self.tickets: list[Ticket] = []
        self.old: list[tuple[str, Record, Certificate]] = []

    def certificate_of(self, node: NodeId) -> Certificate | None:
        for member in self.members.values():
            if member.key.node_id == node:
                return member.standing.certificate
        return None

    def pick(self, number: int) -> str:
        return list(self.members)[number % len(self.members)]

    @initialize(tree=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), SCOPES), min_size=3, max_size=7))
    def grow(self, tree: list[tuple[int, int, Scope]]) -> None:
        """A tree of members to begin with: who invites, who opens the door, and for what."""
        for by, through, scope in tree:
            self.newcomer(by, through, scope)

    @rule(by=WHO, through=WHO, scope=SCOPES)
    def newcomer(self, by: int, through: int, scope: Scope) -> None:
        """Somebody new comes by the invite of one member through the door of another."""
        before = len(self.tickets)
        self.invite(by, scope, 300)
        if len(self.tickets) > before:
            self.join(before, through, None)

    @rule(by=WHO, scope=SCOPES, days=st.integers(1, 300))
    def invite(self, by: int, scope: Scope, days: int) -> None:
        issuer = self.pick(by)
        record = self.model.records.get(issuer)
        member = self.members[issuer]
        founder = issuer == "n0"
        may = founder or (
            record is not None
            and record.expires > self.model.now
            and Scope.SERVE <= record.scope >= scope
            and record.depth < MAX_DEPTH
        )
        try:
            made = member.book.create(scope, days * DAY)
        except MeshError:
            assert not may
            return
        assert may
        invite = read(made.token)
        limit = self.model.now + days * DAY
        if not founder and record is not None:
            limit = min(limit, record.expires)
        assert invite.terms.expires == int(limit)
        name = invite.id.hex()
        self.tickets.append(
            Ticket(name, issuer, scope, int(limit), None if founder else record, made.token, invite.terms.nonce)
        )

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 50), through=WHO, who=WHO | st.none())
    def join(self, which: int, through: int, who: int | None) -> None:
        """A new node, or one that lost its certificate, shows an invite."""
        if who is None and len(self.members) >= MOST_NODES:
            return
        ticket, by = self.tickets[which % len(self.tickets)], self.pick(through)
        node = f"n{len(self.members)}" if who is None else self.pick(who)
        if node in ("n0", by):
            return
        member = self.members.get(node)
        if member is None:
            member = Member(ticket.token, key=KEYS[len(self.members)])
            member.now = self.model.now
            member.known = self.certificate_of
            for data, _ in self.members["n0"].revocations.known():
                member.revocations.add(data)
        elif self.model.holds(self.model.records.get(node)):
            return
        member.tokens = ()
        expected = self.model.admission(node, ticket, by)
        request = member.registrar.request((encode(read(ticket.token)),))
        decision = self.members[by].registrar.decide(request, member.key.node_id)
        if isinstance(decision, Refused):
            assert expected is None, decision.refusal
            return
        assert expected is not None
        assert isinstance(decision, tuple)
        admitted, _ = decision
        assert isinstance(member.registrar.accept_peer(admitted, self.members[by].key.node_id, request), Certificate)
        self.members[node] = member
        self.take(node, expected)

    @rule(who=WHO, by=WHO)
    def renew(self, who: int, by: int) -> None:
        node, door = self.pick(who), self.pick(by)
        held = self.model.records.get(node)
        if node in ("n0", door) or held is None or not self.model.holds(held):
            return
        if self.model.records[door].scope < Scope.SERVE:
            return
        member = self.members[node]
        before = member.standing.encoded
        member.tokens = ()
        outcome = member.join(self.members[door]) if self.model.holds(self.model.records.get(door)) else None
        if outcome is None or isinstance(outcome, Refused):
            return
        expected = self.model.renewal(held, door)
        assert (member.standing.encoded != before) == (expected is not None)
        if expected is not None:
            self.take(node, expected)

    @rule(doors=st.permutations(range(MOST_NODES)))
    def renew_all(self, doors: list[int]) -> None:
        """Everybody asks everybody, in some order."""
        for who in range(1, len(self.members)):
            for by in doors:
                self.renew(who, by)

    def take(self, node: str, record: Record) -> None:
        certificate = self.members[node].standing.certificate
        assert certificate is not None
        assert (certificate.expires, certificate.scope) == (record.expires, record.scope)
        self.model.records[node] = record
        self.old.append((node, record, certificate))

    @rule(days=st.sampled_from([1, 10, 44, 46, 80]))
    def wait(self, days: int) -> None:
        self.model.now += days * DAY
        for member in self.members.values():
            member.now = self.model.now

    @rule(whom=WHO, by=REVOKER)
    def revoke_node(self, whom: int, by: int | None) -> None:
        """The mesh's key, or any member: also one that had no part in it, with a chain of its own making."""
        node = self.pick(whom)
        self.revoke(RevocationKind.NODE, node, self.members[node].key.public, bytes(8), by)

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 50), by=REVOKER)
    def revoke_invite(self, which: int, by: int | None) -> None:
        ticket = self.tickets[which % len(self.tickets)]
        self.revoke(RevocationKind.INVITE, ticket.name, bytes.fromhex(ticket.name), ticket.nonce, by)

    def revoke(self, kind: RevocationKind, what: str, target: bytes, nonce: bytes, by: int | None) -> None:
        founder = self.members["n0"].standing
        assert founder.mesh_key is not None
        revoker = None if by is None else self.members[self.pick(by)]
        if revoker is None:
            key, chain = founder.mesh_key, ()
        else:
            key = revoker.key
            own = revoker.standing.certificate
            assert own is not None
            chain = own.links
            owner = target if kind is RevocationKind.NODE else read(self.ticket(what).token).terms.contacts[0].node
            if owner != revoker.key.public:
                forged = self.forged_link(revoker, own, owner)
                if forged is None:
                    return
                chain = forged.links
        mesh = bytes.fromhex(founder.mesh)
        made = revoke(
            mesh, kind, target, revoker=key.public, issued=int(self.model.now), sign=key.sign, chain=chain, nonce=nonce
        )
        for member in self.members.values():
            outcome = member.revocations.add(encode(made))
            assert outcome is None or isinstance(outcome, Revocation), outcome
        self.model.taken.add((what, MESH if by is None else self.pick(by)))

    def ticket(self, name: str) -> Ticket:
        return next(ticket for ticket in self.tickets if ticket.name == name)

    def forged_link(self, revoker: Member, own: Certificate, owner: bytes) -> Certificate | None:
        """A chain in which the revoker stands above the owner, whether or not the owner ever came in by it."""
        made = issue_certificate(own, owner, Scope.CLIENT, own.expires, bytes(16), revoker.key.sign)
        return made if isinstance(made, Certificate) and owner not in rests_on(own.links) else None

    @invariant()
    def who_is_in_is_who_should_be(self) -> None:
        observer = self.members["n0"].registrar
        for node, record in self.model.records.items():
            member = self.members[node]
            certificate = member.standing.certificate
            assert certificate is not None
            refusal = observer.check(certificate, member.key.node_id)
            assert (refusal is None) == self.model.holds(record), (node, refusal)
            assert (observer.recheck(certificate) is None) == (refusal is None)

    @invariant()
    def old_certificates_give_back_nothing(self) -> None:
        observer = self.members["n0"].registrar
        for node, record, certificate in self.old[-10:]:
            refusal = observer.check(certificate, self.members[node].key.node_id)
            assert (refusal is None) == self.model.holds(record), (node, refusal)

    @invariant()
    def nothing_outlives_what_it_stands_on(self) -> None:
        for _, record, certificate in self.old[-3:]:
            assert certificate.expires <= min((below.expires for below in record.below[:1]), default=1e18)


# No shrinking: with real signatures it takes minutes.
Mesh.TestCase.settings = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    max_examples=200,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMesh = pytest.mark.slow(pytest.mark.timeout(300)(Mesh.TestCase))
