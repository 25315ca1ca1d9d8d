from typing import Any

from tests.support.core_values import GB, config, facts, member, node_id, of_kind, serving

from mesh_llm.core.config import Timings
from mesh_llm.core.listing.content import Listing
from mesh_llm.core.listing.publisher import ListingPublisher, ListingState, coarse_clients
from mesh_llm.core.types.announcement import Announcement, ListingPolicy, Member
from mesh_llm.core.types.effects import AnyEffect, Notice, Publish
from mesh_llm.core.types.events import ClientsCounted, ListingOutcome, PublishRequested
from mesh_llm.core.types.ids import Incarnation
from mesh_llm.core.types.model import ModelStatus

LAB = ListingPolicy(name="Sydney Lab", region="AU", max_clients=10)


def word(number: int, *servings: Any, publicity: ListingPolicy | None = None, **fields: Any) -> Member:
    return member(number, *servings, publicity=publicity, **fields)


class Trial:
    """Node 1, which publishes, with a clock; it lives since 5."""

    def __init__(self, publicity: ListingPolicy | None = LAB) -> None:
        self.publisher = ListingPublisher(config(number=1, publicity=publicity, timings=Timings()))
        self.now = 0.0
        self.others: list[Member] = []
        self.servings: tuple[Any, ...] = ()

    def looks(self, *, stopping: bool = False) -> list[AnyEffect]:
        return self.publisher.evaluate(self.own(), self.others, self.now, stopping=stopping)

    def own(self) -> Announcement:
        fields = {"incarnation": Incarnation(5), "clients": self.publisher.clients}
        return word(1, *self.servings, publicity=self.publisher.announced_policy, **fields).announcement

    def passes(self, seconds: float) -> list[AnyEffect]:
        end, effects = self.now + seconds, list[AnyEffect]()
        while (due := self.publisher.deadline()) is not None and due <= end:
            self.now = due
            effects += self.looks()
        self.now = end
        return effects

    def starts(self) -> Listing:
        assert not of_kind(self.looks(), Publish)
        (publish,) = of_kind(self.passes(2.0), Publish)
        assert publish.listing is not None
        return publish.listing


def published(effects: list[AnyEffect]) -> list[Listing | None]:
    return [effect.listing for effect in of_kind(effects, Publish)]


def test_a_node_that_was_not_asked_publishes_nothing() -> None:
    trial = Trial(publicity=None)
    assert trial.looks() == []
    assert trial.passes(1000.0) == []
    assert trial.publisher.state is ListingState.OFF


def test_it_looks_around_first_then_publishes_and_again_before_it_expires() -> None:
    trial = Trial()
    listing = trial.starts()
    assert (listing.name, listing.region, listing.nodes) == ("Sydney Lab", "AU", 1)
    assert len(published(trial.passes(180.0))) == 3


def test_a_change_goes_out_at_once_but_not_more_often_than_every_ten_seconds() -> None:
    trial = Trial()
    trial.starts()
    trial.now += 30.0
    trial.servings = (serving("m"),)
    (first,) = published(trial.looks())
    assert first is not None
    assert [model.name for model in first.serving] == ["m"]
    trial.now += 1.0
    trial.servings = (serving("m", in_flight=4),)
    assert published(trial.looks()) == []
    (second,) = published(trial.passes(9.0))
    assert second is not None
    assert second.load == 1.0


def test_of_several_that_publish_the_longest_living_does_and_another_takes_over() -> None:
    trial = Trial()
    trial.others = [word(2, publicity=LAB, incarnation=Incarnation(3))]
    trial.looks()
    assert published(trial.passes(100.0)) == []
    assert trial.publisher.state is ListingState.RESTING
    assert trial.publisher.publisher == node_id(2)
    trial.others = []
    (listing,) = published(trial.looks())
    assert listing is not None


def test_it_withdraws_once_when_an_older_publisher_appears() -> None:
    trial = Trial()
    trial.starts()
    trial.others = [word(2, publicity=LAB, incarnation=Incarnation(3))]
    assert published(trial.looks()) == [None]
    assert published(trial.looks()) == []


def test_at_the_cap_of_clients_it_is_delisted_and_below_it_listed_again() -> None:
    trial = Trial()
    trial.starts()
    trial.others = [word(2, serving("m"), clients=6)]
    trial.publisher.handle(ClientsCounted(count=4))
    effects = trial.looks()
    assert published(effects) == [None]
    assert [notice.code for notice in of_kind(effects, Notice)] == ["mesh_full"]
    assert trial.publisher.state is ListingState.FULL
    trial.publisher.handle(ClientsCounted(count=3))
    (listing,) = published(trial.looks())
    assert listing is not None
    assert listing.clients == 9


def test_stopping_and_switching_off_withdraw() -> None:
    trial = Trial()
    trial.starts()
    assert published(trial.looks(stopping=True)) == [None]
    trial = Trial()
    trial.starts()
    trial.publisher.handle(PublishRequested(publicity=None))
    assert published(trial.looks()) == [None]
    assert trial.own().publicity is None
    trial.publisher.handle(PublishRequested(publicity=LAB))
    assert len(published(trial.looks())) == 1


def test_a_publisher_whom_no_relay_hears_says_so_and_another_member_is_elected() -> None:
    trial = Trial()
    trial.starts()
    warned = trial.publisher.handle(ListingOutcome(accepted=0, problem="ws://a does not answer"))
    assert [notice.code for notice in of_kind(warned, Notice)] == ["listing_failed"]
    assert trial.publisher.handle(ListingOutcome(accepted=0, problem="ws://a does not answer")) == []
    assert trial.publisher.state is ListingState.FAILING
    own = trial.own()
    assert own.publicity is not None
    assert own.publicity.failing
    trial.others = [word(2, publicity=LAB, incarnation=Incarnation(9))]
    assert published(trial.looks()) == [None]
    assert trial.own().publicity == own.publicity
    trial.others = []
    assert len(published(trial.looks())) == 1
    told = trial.publisher.handle(ListingOutcome(accepted=1))
    assert [notice.code for notice in of_kind(told, Notice)] == ["mesh_listed"]
    assert trial.publisher.state is ListingState.LISTED


def test_the_listing_tells_of_the_whole_mesh() -> None:
    trial = Trial()
    trial.others = [
        word(2, serving("big", context=8000, in_flight=2), on_disk=(facts("old"),), wanted=("big", "next"), clients=2),
        word(3, serving("big", context=4000), serving("small")),
    ]
    listing = trial.starts()
    assert [(model.name, model.context) for model in listing.serving] == [("big", 4000), ("small", 0)]
    assert [model.name for model in listing.wanted] == ["next"]
    assert [(model.name, model.context) for model in listing.on_disk] == [("old", 4096)]
    assert (listing.nodes, listing.clients, listing.memory_bytes) == (3, 2, 48 * GB)
    assert listing.load == 0.2


def test_a_model_is_wanted_until_it_answers() -> None:
    trial = Trial()
    trial.others = [word(2, serving("big", status=ModelStatus.LOADING), wanted=("big",))]
    assert [model.name for model in trial.starts().wanted] == ["big"]
    trial.others = [word(2, serving("big"), wanted=("big",))]
    (listing,) = published(trial.passes(60.0))
    assert listing is not None
    assert (listing.wanted, [model.name for model in listing.serving]) == ((), ["big"])


def test_many_clients_are_told_roughly() -> None:
    assert [coarse_clients(count) for count in (0, 7, 99, 100, 104, 1234, 98765)] == [0, 7, 99, 100, 100, 1200, 98000]


def test_the_announced_wish_says_whether_the_invites_of_its_listings_are_marked() -> None:
    for marked in (False, True):
        publisher = ListingPublisher(config(number=1, publicity=LAB, marks_listings=marked))
        wish = publisher.announced_policy
        assert wish is not None
        assert (wish.marked, wish.name) == (marked, LAB.name)
        publisher.handle(PublishRequested(publicity=None))
        assert publisher.announced_policy is None
        publisher.handle(PublishRequested(publicity=LAB))
        assert publisher.announced_policy == wish
