"""Platform-specific implementations of the operations of the model.

Each operation has a module with a function that the model calls, a plain
`reference` implementation with automatic derivatives, and faster variants for
some platforms. To add a kernel, pass it to `dispatch.Compute.choose` under the
name of its platform, and compare it with `reference` in tests/kernels.
"""
