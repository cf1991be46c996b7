"""The rehearsal: GPU-marked tests over a stand-in CUDA runtime, under torch's CUDA build, without a GPU.

``python -m tests.rehearsal`` runs it in an interpreter that has a CUDA build of torch; ``make rehearse``
makes one first. Real are torch's allocators, streams, events and checks for hidden synchronization, and
everything of the project down to its calls of cupy. Doubles are the runtime (`cudart.cpp`), cupy
(`packages/cupy`), torch's own kernels (`host_ops`) and nvCOMP (`plugin`). Kernels of the project run as in
`tests.emulation`.
"""
