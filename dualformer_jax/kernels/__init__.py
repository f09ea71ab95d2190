"""Platform-specific implementations of the operations of the model.

Each operation has a module with a function that the model calls. Most modules
have a plain `reference` implementation with automatic derivatives, and faster
variants for some platforms; in `mlp` the plain one is `composed`, in `patches`
`_default`. `attention_branch` and `norm_pool` have none: without a kernel, the
model calls the separate operations.

`dispatch.Compute.choose` selects by platform. The module of the operation then
decides whether dtype, chip and sizes are supported. To add a kernel, pass it to
`choose` under the name of its platform, and compare it with the plain
implementation in tests/kernels.
"""
