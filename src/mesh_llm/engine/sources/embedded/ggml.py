"""ggml's C API for devices and the RPC backend (ggml/include/ggml-backend.h, ggml-rpc.h).

Use `Ggml` only in a child process: loading takes 100 MB of address space, and a crash of the library ends the process.
"""

import ctypes
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NewType

from mesh_llm.engine.spec import DeviceInfo, DeviceKind, RpcWorkerSpec

PACKAGE = "xllamacpp"
"""The wheel's name, and its module's."""

Device = NewType("Device", int)
"""A `ggml_backend_dev_t`."""

Registry = NewType("Registry", int)
"""A `ggml_backend_reg_t`."""

# enum ggml_backend_dev_type; 4 is a device made of others.
_KINDS = {0: DeviceKind.CPU, 1: DeviceKind.GPU, 2: DeviceKind.INTEGRATED_GPU, 3: DeviceKind.ACCELERATOR}

_SOFTWARE = re.compile(r"llvmpipe|lavapipe|softpipe|swiftshader|software rasterizer", re.IGNORECASE)
"""In the names of devices that are the processor again. ggml does not say so; Vulkan calls them CPUs."""

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_load": (c_void_p, [c_char_p]),
    "ggml_backend_unload": (None, [c_void_p]),
    "ggml_backend_register": (None, [c_void_p]),
    "ggml_backend_device_register": (None, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_get": (c_void_p, [c_size_t]),
    "ggml_backend_dev_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_description": (c_char_p, [c_void_p]),
    "ggml_backend_dev_type": (c_int, [c_void_p]),
    "ggml_backend_dev_memory": (None, [c_void_p, POINTER(c_size_t), POINTER(c_size_t)]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_version": (c_char_p, []),
}

# Words of structures in ggml/src/ggml-backend-impl.h.
_DEVICE_WORDS, _DEVICE_TYPE, _DEVICE_REGISTRY = 17, 3, 15
"""Of `struct ggml_backend_device`: 15 functions, its registry and its context."""

_REGISTRY_WORDS, _REGISTRY_NAME, _REGISTRY_CONTEXT = 6, 1, 5
"""Of `struct ggml_backend_reg`: the version, 4 functions and its context."""

_StartServer = ctypes.CFUNCTYPE(None, c_char_p, c_char_p, c_size_t, c_size_t, POINTER(c_void_p))
_AddServer = ctypes.CFUNCTYPE(c_void_p, c_char_p)


class GgmlError(RuntimeError):
    """The library refused something; the text says what."""


def library_path() -> Path | None:
    """The wheel's shared library; None if the wheel is not installed. Loads nothing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob(f"{PACKAGE}*.so"))), None)


def wheel() -> Any:
    """The wheel's module, untyped. Loads the library."""
    return importlib.import_module(PACKAGE)


class Ggml:
    """The loaded library. Its symbols become global, so that a plugin finds them."""

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise GgmlError("the xllamacpp wheel is not installed")
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.functions(_SIGNATURES)
        self._plugins: list[ctypes.CDLL] = []
        self._kept: list[Any] = []

    def functions(self, signatures: Mapping[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
        """More functions of the library. `signatures`: result and argument types by name."""
        found: dict[str, Any] = {}
        for name, (result, arguments) in signatures.items():
            function = found[name] = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        return found

    @property
    def version(self) -> str:
        """The version of ggml."""
        return self._library.ggml_version().decode()

    def devices(self) -> list[tuple[Device, DeviceInfo]]:
        """All registered devices, in ggml's order."""
        found: list[tuple[Device, DeviceInfo]] = []
        for index in range(self._library.ggml_backend_dev_count()):
            device = Device(self._library.ggml_backend_dev_get(index))
            kind = _KINDS.get(self._library.ggml_backend_dev_type(device))
            if kind is not None:
                found.append((device, self._describe(device, kind)))
        return found

    def _describe(self, device: Device, kind: DeviceKind) -> DeviceInfo:
        free, total = c_size_t(0), c_size_t(0)
        name = self._library.ggml_backend_dev_description(device).decode(errors="replace")
        self._library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        return DeviceInfo(
            id=self._library.ggml_backend_dev_name(device).decode(),
            name=name,
            kind=DeviceKind.SOFTWARE if kind is not DeviceKind.CPU and _SOFTWARE.search(name) else kind,
            memory_total=total.value,
            memory_free=free.value,
        )

    def buffer_type(self, device: Device) -> str:
        """The name of a device's memory for `--override-tensor`."""
        return self._library.ggml_backend_buft_name(self._library.ggml_backend_dev_buffer_type(device)).decode()

    def load_plugin(self, path: Path) -> Registry:
        """Load a backend. Raises GgmlError if the library refuses it (another version, a damaged file)."""
        registry = self._library.ggml_backend_load(str(path).encode())
        if not registry:
            raise GgmlError(f"ggml does not load {path}")
        # Its code must stay when its registry is given up (`keep_devices`).
        self._plugins.append(ctypes.CDLL(str(path)))
        return Registry(registry)

    def keep_devices(self, names: Sequence[str]) -> None:
        """Leave only these devices beside the processor, in this order. Before any model is loaded.

        Without a list of devices, which the wheel's parameters lack, llama.cpp uses all that are registered. A device
        that is left out is not even initialised, and keeps its memory. Raises GgmlError for a name that is not there.
        """
        known = {info.id: (device, info) for device, info in self.devices()}
        missing = [name for name in names if name not in known]
        if missing:
            raise GgmlError(f"there is no device {missing[0]}; there are {', '.join(known)}")
        kept = [known[name][0] for name in names if known[name][1].computes_apart]
        registered = [device for device, info in known.values() if info.computes_apart]
        if kept == registered:
            return
        for registry in {self._library.ggml_backend_dev_backend_reg(device) for device in registered}:
            self._library.ggml_backend_unload(registry)
        for device in kept:
            self._library.ggml_backend_device_register(device)

    def load_accelerators(self, paths: Sequence[Path]) -> None:
        """Load plugins of accelerators. One that the library refuses is left out, with a line on standard error."""
        for path in paths:
            try:
                self.load_plugin(path)
            except GgmlError as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)  # noqa: T201 - goes to the child's log

    def serve_rpc(
        self, registry: Registry, endpoint: str, devices: Sequence[Device], threads: int, cache: str | None = None
    ) -> bool:
        """Serve devices at `host:port`. Blocks, without Python's lock; returns False if it could not listen.

        `cache`: a directory for the tensors that are sent, as for `rpc-server -c`; None keeps none.
        """
        if not devices:
            raise GgmlError("no device to serve")
        start = _StartServer(self._procedure(registry, "ggml_backend_rpc_start_server"))
        start(
            endpoint.encode(),
            cache.encode() if cache else None,
            threads,
            len(devices),
            (c_void_p * len(devices))(*devices),
        )
        return False

    def add_rpc_servers(
        self, registry: Registry, endpoints: Sequence[str], *, before: bool = False, after: bool = False
    ) -> None:
        """Register the devices of remote servers, in their order; the processor before them, after them, or both.

        Both are devices of their own: llama.cpp computes the norms of a layer on the last device that is the layer's.

        ggml aborts the process if a server does not answer.
        """
        add = _AddServer(self._procedure(registry, "ggml_backend_rpc_add_server"))
        remote = None
        for endpoint in endpoints:
            remote = add(endpoint.encode())
            if not remote:
                raise GgmlError(f"RPC server {endpoint} lends no device")
            if before:
                self._add_host(registry, self._library.ggml_backend_reg_dev_get(remote, 0))
                before = False
            self._library.ggml_backend_register(remote)
        if after and remote:
            self._add_host(registry, self._library.ggml_backend_reg_dev_get(remote, 0))

    def _add_host(self, registry: Registry, remote: Device) -> None:
        """Register the processor once more, as if it were an RPC server's device.

        llama.cpp knows where a layer ends only if all layers are offloaded, and gives operators without weights to the
        processor last. With layers that stay on the processor, the norm at the beginning of a layer is computed on the
        device before it, and the sum at the end of the processor's last layer on the device behind it: two tensors
        travel for each token where one is enough. As a device, the processor has the same memory and the same code.
        Sources: llama_prepare_model_devices, llama_context::graph_get_cb, ggml_backend_sched_split_graph.

        The wheel loads models while it holds Python's lock, so only functions of the libraries can be called meanwhile:
        the type is that of the remote device, and the registry's name the plugin's.
        """
        processor = next((device for device, info in self.devices() if info.kind is DeviceKind.CPU), 0)
        own = self._library.ggml_backend_dev_backend_reg(processor) if processor else 0
        device, server = _words(processor, _DEVICE_WORDS), _words(remote, _DEVICE_WORDS)
        theirs = _words(registry, _REGISTRY_WORDS)
        if not own or device[_DEVICE_REGISTRY] != own or server[_DEVICE_REGISTRY] != registry:
            raise GgmlError("the processor cannot be registered again")
        group = _words(own, _REGISTRY_WORDS)
        group[_REGISTRY_NAME], group[_REGISTRY_CONTEXT] = theirs[_REGISTRY_NAME], theirs[_REGISTRY_CONTEXT]
        device[_DEVICE_TYPE], device[_DEVICE_REGISTRY] = server[_DEVICE_TYPE], ctypes.addressof(group)
        self._kept += [device, group]
        self._library.ggml_backend_device_register(ctypes.addressof(device))

    def choose_devices(self, spec: RpcWorkerSpec) -> list[Device]:
        """The named devices; or all GPUs; or the CPU. Raises GgmlError for a name that is not there."""
        known = self.devices()
        if spec.devices:
            by_id = {info.id: device for device, info in known}
            missing = [name for name in spec.devices if name not in by_id]
            if missing:
                raise GgmlError(f"there is no device {missing[0]}; there are {', '.join(by_id)}")
            return [by_id[name] for name in spec.devices]
        gpus = [device for device, info in known if info.holds_models]
        return gpus or [device for device, info in known if info.kind is DeviceKind.CPU][:1]

    def _procedure(self, registry: Registry, name: str) -> int:
        address = self._library.ggml_backend_reg_get_proc_address(registry, name.encode())
        if not address:
            raise GgmlError(f"the plugin has no {name}")
        return address


def _words(address: int, count: int) -> "ctypes.Array[c_void_p]":
    """A copy of a structure of pointers; of zeros without an address."""
    kind = c_void_p * count
    return kind(*kind.from_address(address)) if address else kind()
