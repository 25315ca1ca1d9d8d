from typing import cast, get_args

import pytest

from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.daemon.driver import effect_handlers
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.load_asks import LoadAsks
from mesh_llm.daemon.published_state import PublishedState
from mesh_llm.daemon.status import api_base
from mesh_llm.net.mesh import MeshNet


class Anything:
    """Has every attribute: which method carries out an effect is not what is tested here."""

    def __getattr__(self, name: str) -> "Anything":
        return self


def test_every_kind_of_effect_is_carried_out_by_somebody() -> None:
    anything = Anything()
    engines, net, published = cast("Engines", anything), cast("MeshNet", anything), cast("PublishedState", anything)
    asks = cast("LoadAsks", anything)
    handlers = effect_handlers(engines, net, published, asks=asks, lend=print, fetch=print, publish=print, client=False)
    assert {kind.__name__ for kind in get_args(AnyEffect)} == {kind.__name__ for kind in handlers}


@pytest.mark.parametrize(
    ("listen", "base"),
    [
        ("127.0.0.1", "http://127.0.0.1:5/v1"),
        ("0.0.0.0", "http://127.0.0.1:5/v1"),
        ("192.168.1.7", "http://192.168.1.7:5/v1"),
        ("::1", "http://[::1]:5/v1"),
    ],
)
def test_the_address_for_clients_here(listen: str, base: str) -> None:
    assert api_base(listen, 5) == base
