"""The unit of systemd that runs a node: its text, and what an installed one says."""

import msgspec

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.service_manager.notify import START_SECONDS

NAME = "mesh-llm"
UNIT = f"{NAME}.service"
USER = "mesh-llm"
"""The user of a system service."""
STATE = "/var/lib/mesh-llm"
"""The home of a system service."""
MARK = "# Written by `mesh-llm service install`."

GPU_GROUPS = ("video", "render")
"""Groups that may open a GPU's device files, where they exist."""

_CHOSEN = "Chosen="


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """What the user chose at the installation: fields as in Unit."""

    options: tuple[str, ...] = ()
    home: str = ""
    models: str = ""


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What a unit depends on.

    Attributes:
        system: of the machine, with a user of its own; else of the present user.
        program: the command, a path that stays the same when mesh-llm is updated.
        chosen: options of `mesh-llm serve` (the settings file has the others), MESH_LLM_HOME and MESH_LLM_MODELS
            (empty: the default).
        groups: for a system service, those of GPU_GROUPS that exist.
        modprobe: path of nvidia-modprobe, which makes the device files of an NVIDIA card; empty: not there.
    """

    system: bool
    program: tuple[str, ...]
    chosen: Chosen = Chosen()
    groups: tuple[str, ...] = ()
    modprobe: str = ""

    def text(self) -> str:
        """The file. Each limit that is not obvious has its reason beside it."""
        command = " ".join(_word(word) for word in (*self.program, "serve", *self.chosen.options))
        home, models = self._places()
        variables = [("MESH_LLM_HOME", home), ("MESH_LLM_MODELS", models)]
        lines = [
            MARK,
            "# Do not edit it, it is written again: `systemctl edit` adds settings of your own.",
            "[Unit]",
            "Description=mesh-llm node",
            # A machine whose network comes late must not give up.
            "StartLimitIntervalSec=0",
            *(_NETWORK if self.system else ()),
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            f"ExecStart={command}",
            "# It reads its settings again.",
            "ExecReload=kill -HUP $MAINPID",
            *(f"Environment={_quoted(f'{name}={value}')}" for name, value in variables if value),
            *_LIFE,
            *(self._system() if self.system else self._user()),
            "",
            "[Install]",
            f"WantedBy={'multi-user' if self.system else 'default'}.target",
            "",
            "[X-mesh-llm]",
            _CHOSEN + msgspec.json.encode(self.chosen).decode(),
            "",
        ]
        return "\n".join(lines)

    def _places(self) -> tuple[str, str]:
        if self.system:
            return STATE, self.chosen.models or f"{STATE}/models"
        return self.chosen.home, self.chosen.models

    def _system(self) -> list[str]:
        lines = ["", f"User={USER}", f"Group={USER}"]
        if self.groups:
            lines += ["# They may open the device files of GPUs.", f"SupplementaryGroups={' '.join(self.groups)}"]
        if self.modprobe:
            lines += [
                "# As root: the driver would start it from the node, where it has no rights.",
                f"ExecStartPre=-+{_word(self.modprobe)} -c 0 -u",
            ]
        lines += _SYSTEM
        if self.chosen.models:
            lines.append(f"ReadWritePaths={_quoted('-' + self.chosen.models)}")
        return lines + list(_FILTERS)

    def _user(self) -> list[str]:
        if self.modprobe:
            return [
                "# No NoNewPrivileges and no filters: NVIDIA's driver starts nvidia-modprobe, which is setuid root."
            ]
        return ["NoNewPrivileges=yes", *_FILTERS]


_NETWORK = ("Wants=network-online.target", "After=network-online.target")

_LIFE = (
    "",
    "# Engines are not signalled: the node lets answers end first. It asks for the time that this takes.",
    "KillMode=mixed",
    "TimeoutStopSec=60",
    "# Until the API answers. Models load after that; the status line says so.",
    f"TimeoutStartSec={START_SECONDS:.0f}",
    "WatchdogSec=120",
    "TimeoutAbortSec=10",
    "",
    "# Not after `mesh-llm stop`, and not when an option is wrong.",
    "Restart=on-failure",
    "RestartSec=10",
    "RestartPreventExitStatus=2",
    "# Stopped in the middle of its start.",
    "SuccessExitStatus=130 143",
    "# An engine that the kernel ends for want of memory is started again by the node.",
    "OOMPolicy=continue",
    "# A dump would hold prompts and keys.",
    "LimitCORE=0",
    "LimitNOFILE=524288",
    "# The journal knows the time of each line, and the node writes none.",
    "StandardOutput=journal",
    "StandardError=inherit",
    f"SyslogIdentifier={NAME}",
)

_SYSTEM = (
    f"StateDirectory={NAME}",
    "StateDirectoryMode=0700",
    f"WorkingDirectory={STATE}",
    "UMask=0077",
    "# Drivers of GPUs pin memory.",
    "LimitMEMLOCK=infinity",
    "",
    "# No PrivateDevices and no DeviceAllow: GPUs are device files, some with numbers that are not known before their",
    "# driver is first used. The rights of the files and the groups above decide. ProtectClock implies a DeviceAllow.",
    "# No MemoryDenyWriteExecute: drivers of GPUs compile code while they run.",
    "# No ProtectProc and no ProcSubset: engines read /proc, and --yield looks at the load of other programs.",
    "# No PrivateUsers: the groups of the device files would be lost.",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "# Models and programs may lie there, for users who may read them.",
    "ProtectHome=read-only",
    "PrivateTmp=yes",
    "PrivateMounts=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "RemoveIPC=yes",
    "# Netlink: the addresses of this machine.",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
)

_FILTERS = (
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "# The last four confine the RPC servers of split models.",
    "SystemCallFilter=@system-service landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp",
)


def installed_choice(text: str) -> Chosen:
    """What the user chose for an installed unit, by its text."""
    for line in text.splitlines():
        if line.startswith(_CHOSEN):
            try:
                return msgspec.json.decode(line.removeprefix(_CHOSEN), type=Chosen)
            except UNREADABLE:
                return Chosen()
    return Chosen()


def installed_program(text: str) -> str:
    """The path of the program that an installed unit starts; empty if it does not say."""
    for line in text.splitlines():
        if line.startswith("ExecStart="):
            return _unquoted(line.removeprefix("ExecStart="))
    return ""


def _quoted(text: str) -> str:
    """A value with spaces and the like, as systemd.syntax(7) has it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    return f'"{escaped}"'


def _word(text: str) -> str:
    """A word of a command, in which systemd.service(5) also replaces variables."""
    return _quoted(text).replace("$", "$$")


def _unquoted(line: str) -> str:
    """The first word of a command as `_word` writes it."""
    if not line.startswith('"'):
        return line.split(maxsplit=1)[0] if line.strip() else ""
    word, position = "", 1
    while position < len(line) and line[position] != '"':
        if line[position] in "\\%$":
            position += 1
        word += line[position : position + 1]
        position += 1
    return word
