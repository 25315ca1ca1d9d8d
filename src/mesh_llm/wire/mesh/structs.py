"""The wire's form of core structs, derived from their declarations: a field is declared once, in the core.

On the wire an id is 32 bytes, a nested struct is an array that may grow (`LATER`), and every number and text is
bounded: by the `msgspec.Meta` of its field, or by the limits of `core/types/announcement.py` where the field has none.
"""

from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import msgspec

from mesh_llm.core.types.announcement import Count, Model, Rate, Text
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import LATER
from mesh_llm.wire.codec import Key


def _same(value: Any) -> Any:
    return value


class Codec(NamedTuple):
    """How a value travels: as a value of `type`, which `write` makes of it and `read` turns back.

    `whole`: where `write` leaves `LATER` fields out, and gives a tuple: makes a value of `type` of it.
    """

    type: Any
    write: Callable[[Any], Any] = _same
    read: Callable[[Any], Any] = _same
    whole: Callable[[Any], Any] | None = None


_ID = Codec(Key, bytes.fromhex, bytes.hex)
_PLAIN: dict[Any, Codec] = {
    NodeId: _ID,
    MeshId: _ID,
    OwnerId: _ID,
    ModelName: Codec(Model),
    Incarnation: Codec(Count),
    int: Codec(Count),
    float: Codec(Rate),
    str: Codec(Text),
}


def derive(
    core: type[msgspec.Struct],
    special: Mapping[Any, Codec] | None = None,
    *,
    required: int = 0,
    tag: int | None = None,
    as_map: bool = False,
) -> Codec:
    """The wire's form of a core struct.

    Args:
        core: its fields travel in the order of their declaration.
        special: codecs of fields, by the field's name or type, where the wire's form differs.
        required: as many of the first fields must be there, even where the core's have defaults.
        tag: number in front of the array.
        as_map: a map by field name, without fields that have their defaults, instead of an array.
    """
    special = special or {}
    hints = get_type_hints(core, include_extras=True)
    definition: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    writers: list[tuple[str, Callable[[Any], Any]]] = []
    readers: list[tuple[str, Callable[[Any], Any]]] = []
    later: list[tuple[str, Any]] = []
    for position, field in enumerate(msgspec.structs.fields(core)):
        hint, is_later = _without_mark(hints[field.name])
        codec = special.get(field.name) or _codec(hint, special)
        writers.append((field.name, codec.write))
        if codec.read is not _same:
            readers.append((field.name, codec.read))
        default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        if default is msgspec.NODEFAULT or position < required:
            definition.append((field.name, codec.type))
        else:
            written = codec.write(default)
            definition.append((field.name, codec.type, codec.whole(written) if codec.whole else written))
        if is_later:
            later.append((field.name, default))
    struct = msgspec.defstruct(
        f"Wire{core.__name__}",
        definition,
        frozen=True,
        kw_only=True,
        array_like=not as_map,
        omit_defaults=as_map,
        tag=tag,
    )

    def write(value: Any) -> Any:
        wire = struct(
            **{
                name: getattr(value, name) if writer is _same else writer(getattr(value, name))
                for name, writer in writers
            }
        )
        if later and not as_map and all(getattr(value, name) == default for name, default in later):
            return msgspec.structs.astuple(wire)[: -len(later)]
        return wire

    def whole(wire: Any) -> Any:
        if isinstance(wire, struct):
            return wire
        return struct(**{name: wire[place] for place, name in enumerate(struct.__struct_fields__) if place < len(wire)})

    def read(wire: Any) -> Any:
        fields = msgspec.structs.asdict(whole(wire))
        for name, reader in readers:
            fields[name] = reader(fields[name])
        return core(**fields)

    return Codec(struct, write, read, whole if later else None)


def _without_mark(hint: Any) -> tuple[Any, bool]:
    """A field's type without the mark `LATER`, and whether it had it."""
    if get_origin(hint) is not Annotated or LATER not in get_args(hint)[1:]:
        return hint, False
    base, *metas = (one for one in get_args(hint) if one is not LATER)
    return (Annotated[base, *metas] if metas else base), True


def _codec(hint: Any, special: Mapping[Any, Codec]) -> Codec:
    """How values of this type travel."""
    if get_origin(hint) is Annotated:
        base, *metas = get_args(hint)
        if base in {int, float, str, bytes, ModelName}:
            return Codec(hint)
        inner = _codec(base, special)
        return Codec(Annotated[inner.type, *metas], inner.write, inner.read)
    try:
        known = special.get(hint) or _PLAIN.get(hint)
    except TypeError:
        known = None
    if known is not None:
        return known
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        inner = _codec(arguments[0], special)
        kind = tuple[inner.type, ...] if arguments[-1] is Ellipsis else tuple[(inner.type,) * len(arguments)]
        return Codec(kind, _over(inner.write), _over(inner.read))
    if origin in {Union, UnionType}:
        (present,) = (one for one in arguments if one is not NoneType)
        inner = _codec(present, special)
        return Codec(inner.type | None, _unless_none(inner.write), _unless_none(inner.read))
    if origin is dict:
        key, value = (_codec(one, special) for one in arguments)
        return Codec(dict[key.type, value.type])
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return derive(hint, special)
    return Codec(hint)


def _over(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return _same if convert is _same else lambda values: tuple(map(convert, values))


def _unless_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return _same if convert is _same else lambda value: None if value is None else convert(value)
