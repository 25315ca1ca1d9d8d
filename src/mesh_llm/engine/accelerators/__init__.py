"""Accelerators: plugins of ggml with which the embedded engine computes on a GPU, and how this machine gets them.

A plugin is a part of the installation (`engine/installation.py`), beside the RPC plugin. Its kind is `cuda`, `rocm` or
`vulkan`. The engine's children load one accelerator's plugin, the last that was installed; `EmbeddedSource` passes it
on (`sources/embedded/backends.py`), and lists all of them in `EngineInfo.parts`.

    cards.py         the GPUs of this machine, whether or not an engine can use them
    recipe.py        what each kind needs to be built, found by trial; what is missing, by the names of packages
    toolbox.py       what can be had without a change of the system: cmake, headers, CUDA's compiler
    build.py         the build: resumable, at low priority, with its progress
    index.py         indexes of wheels: which of their files is this release with an accelerator; index_client.py asks
    prebuilt.py      a prebuilt engine out of such a wheel, which wheel_archive.py unpacks; it is a part as a plugin is
    selftest.py      operators and a short text, on the device and on the processor
    install_main.py  the same for a node that goes on meanwhile, in a process of its own
    installation.py  all of it together, and the interface for commands and the daemon:

        offer(cache, gpu="auto", index=None) -> Offer  what `install` would do: kind, card, seconds, bytes to download,
                                                   the wheel if there is one. `index.configured()` says where to look.
                                                   MeshError `no_gpu`, `accelerator_needs`, `accelerator_set_aside`
        install(cache, offer, progress, ...) -> Part  get it, test it, note it in the manifest. Blocks, for minutes.
                                                   Only one at a time on a machine; the second waits. A second start
                                                   goes on where the first was interrupted
        interrupted(cache) -> kind or None         a build that was started and not finished
        remove(cache, kind) -> bool                delete the plugin, and what is left of builds

`progress` gets a `Step`: a stable name, a sentence, percent and seconds left where they are known.
"""
