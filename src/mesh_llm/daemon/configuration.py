"""The configuration of a running node: reads it again, says what changed, and writes a model's settings to the file."""

import asyncio
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from mesh_llm.console.schema import ModelSettingsShown, Reloaded
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import NO_SETTINGS, settings_of
from mesh_llm.daemon.model_tables import FIELDS, MODELS, merge_tables, model_tables
from mesh_llm.daemon.settings import Configuration, Settings
from mesh_llm.runtime.config_file import ConfigFile, parse_config, plain, read_config, user_path
from mesh_llm.runtime.home import write_atomic

LIVE_OPTIONS = frozenset(
    (
        "allow-origin",
        "api-key",
        "api-key-file",
        "cache-type",
        "cpu-moe",
        "ctx-size",
        "default-model",
        "draft",
        "draft-max",
        "gpu-layers",
        "key-limit",
        "log-level",
        "no-draft",
        "parallel",
        "spec",
        "stranger-limit",
    )
)
"""Options that change while a node runs. All others take effect at its next start."""

_log = structlog.get_logger(__name__)


class ConfigurationControl:
    """The configuration of one process. It outlives a move to another mesh.

    Attributes:
        apply: gives a running node its new settings, of which it takes those that can change; None while none runs.
            Raises MeshError, and changes nothing then.
        notify: shows a notice to the user.
    """

    def __init__(self, present: Configuration, load: Callable[[], Configuration]) -> None:
        """`load`: reads everything again; called in a thread. Raises MeshError."""
        self.present = present
        self.apply: Callable[[Settings], None] | None = None
        self.notify: Callable[[Notice], None] = lambda _: None
        self._load = load
        self._lock = asyncio.Lock()
        self._wanted = False

    async def reload(self) -> Reloaded:
        """Read everything again, and change what can change. Raises MeshError; the present settings stay then."""
        async with self._lock:
            return await self._reload()

    async def reload_by_signal(self) -> None:
        """The same; what comes of it is a notice. A node that is starting does it once it runs."""
        if self.apply is None:
            self._wanted = True
            return
        try:
            reloaded = await self.reload()
        except MeshError as error:
            text = f"The configuration stays as it is. {error.message} {error.hint}".strip()
            self.notify(Notice(level=NoticeLevel.WARNING, code="config_refused", text=text))
            return
        level = NoticeLevel.WARNING if reloaded.restart else NoticeLevel.INFO
        self.notify(Notice(level=level, code="config_reloaded", text=reloaded.text))

    def begin(self, apply: Callable[[Settings], None]) -> bool:
        """A node runs. Returns whether a signal came while it started."""
        self.apply = apply
        wanted, self._wanted = self._wanted, False
        return wanted

    def model(self, model: str) -> ModelSettingsShown:
        """The settings of a model now, and where they are written."""
        found = settings_of(model, self.present.settings.model_settings)
        return ModelSettingsShown(model=model, settings=found, file=str(user_path()))

    async def change_model(self, model: str, changes: Mapping[str, Any]) -> Reloaded:
        """Write settings of one model to the user's file, and reload. None takes a setting away.

        Comments and everything else in the file stay. Raises MeshError; the file stays as it was then.
        """
        by_name = {plain(key): value for key, value in changes.items()}
        if len(by_name) < len(changes):
            raise MeshError(
                code="bad_request",
                message="A setting is given twice, with a dash and with an underscore.",
                hint="Give it once.",
                status=400,
            )
        unknown = [key for key in by_name if key not in FIELDS]
        if unknown:
            raise MeshError(
                code="bad_request",
                message=f"{unknown[0][:60]} is no setting of a model.",
                hint=f"There are {', '.join(FIELDS)}.",
                status=400,
            )
        template = by_name.get("chat-template")
        if isinstance(template, str) and template.startswith("@"):
            # Who may use the console from another machine may not read this one's files.
            raise MeshError(
                code="bad_request",
                message="A file with a chat template can be named in the configuration file only.",
                hint="Give the template itself, or type mesh-llm config edit on the node's machine.",
                status=400,
            )
        async with self._lock:
            path, before = await asyncio.to_thread(_write_model, model, by_name)
            try:
                return await self._reload()
            except MeshError:
                await asyncio.to_thread(_restore, path, before)
                raise

    async def _reload(self) -> Reloaded:
        if self.apply is None:
            raise MeshError(
                code="starting", message="The node is starting.", hint="Try again when it runs.", status=503
            )
        read = await asyncio.to_thread(self._load)
        reloaded = compare(self.present, read)
        self.apply(read.settings)
        # What takes effect at the next start only is said again at each reload until then.
        values = {
            key: text if key in LIVE_OPTIONS else self.present.values.get(key, "") for key, text in read.values.items()
        }
        self.present = Configuration(settings=read.settings, values=values, files=read.files)
        _log.info("configuration read", applied=", ".join(reloaded.applied), restart=", ".join(reloaded.restart))
        return reloaded


def compare(before: Configuration, after: Configuration) -> Reloaded:
    """What differs, and which of it takes effect while the node runs."""
    changed = {key for key, text in after.values.items() if before.values.get(key, "") != text}
    if before.settings.api_keys != after.settings.api_keys and not changed & {"api-key", "api-key-file"}:
        # Other keys in the same file.
        changed.add("api-key-file")
    applied = sorted(changed & LIVE_OPTIONS)
    own, new = before.settings.model_settings, after.settings.model_settings
    names = sorted({*own, *new})
    applied += [f"{MODELS}.{name}" for name in names if own.get(name, NO_SETTINGS) != new.get(name, NO_SETTINGS)]
    if before.settings.aliases != after.settings.aliases:
        applied.append("aliases")
    restart = sorted(changed - LIVE_OPTIONS)
    return Reloaded(
        applied=tuple(applied),
        restart=tuple(restart),
        text=_text(applied, restart),
        files=tuple(map(str, after.files)),
    )


def _text(applied: list[str], restart: list[str]) -> str:
    parts = [f"In effect now: {', '.join(applied)}."] if applied else []
    if restart:
        parts.append(f"At the next start of the node: {', '.join(restart)}.")
    return f"The configuration was read again. {' '.join(parts) or 'Nothing changed.'}"


def with_live_settings(present: Settings, read: Settings) -> Settings:
    """The settings of a running node, with those of `read` that can change while it runs."""
    launch = msgspec.structs.replace(
        read.launch, most_slots=present.launch.most_slots, use_projector=present.launch.use_projector
    )
    return msgspec.structs.replace(
        present,
        launch=launch,
        model_settings=read.model_settings,
        aliases=read.aliases,
        allow_origins=read.allow_origins,
        default_model=read.default_model,
        api_keys=read.api_keys,
        key_limits=read.key_limits,
        log_level=read.log_level,
    )


def _write_model(model: str, changes: Mapping[str, Any]) -> tuple[Path, ConfigFile | None]:
    """Change the table of a model in the user's file. Returns the file's place, and the file as it was, if it was."""
    path = user_path()
    before = read_config(path)
    file = before or ConfigFile(path, "", {})
    text = edited(file, model, changes)
    merge_tables([parse_config(path, text.encode())])
    # The file may be a link to where the user keeps such files.
    place = path.resolve()
    write_atomic(place, text.encode(), file.mode)
    return place, before


def _restore(place: Path, before: ConfigFile | None) -> None:
    if before is None:
        place.unlink(missing_ok=True)
    else:
        write_atomic(place, before.text.encode(), before.mode)


def edited(file: ConfigFile, model: str, changes: Mapping[str, Any]) -> str:
    """The text of a file with other settings of one model; comments and order stay.

    Raises:
        MeshError: `config_not_editable` where the file is written in a way that cannot be changed by a program.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    wanted = {name: dict(table) for name, table in model_tables(file).items()}
    name = next((one for one in wanted if one.casefold() == model.casefold()), model)
    own: dict[str, Any] = wanted.setdefault(name, {})
    for key, value in changes.items():
        own.pop(plain(key), None)
        if value is not None:
            own[plain(key)] = value
    try:
        document: Any = tomlkit.parse(file.text)
        if MODELS not in document:
            document[MODELS] = tomlkit.table(is_super_table=True)
        if name not in document[MODELS]:
            document[MODELS][name] = tomlkit.table()
        table = document[MODELS][name]
        for key, value in changes.items():
            written = next((one for one in table if plain(one) == plain(key)), plain(key))
            if value is None:
                table.pop(written, None)
            else:
                table[written] = value
        text = str(tomlkit.dumps(document))
        result = tomllib.loads(text)
    except (TOMLKitError, tomllib.TOMLDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_editable(file, str(error)) from error
    rest = {key: value for key, value in result.items() if key != MODELS}
    if rest != {key: value for key, value in file.values.items() if key != MODELS} or set(result[MODELS]) != set(
        wanted
    ):
        raise _not_editable(file, "it would have lost something")
    return text


def _not_editable(file: ConfigFile, why: str) -> MeshError:
    return MeshError(
        code="config_not_editable",
        message=f"{file.path} could not be changed: {why}.",
        hint="Change it by hand: mesh-llm config edit",
        status=409,
    )
