"""Triton kernels of the ops, one module per op: forward, gradients and launch, nothing else.

The functions take tensors as the ops registered in `xtalfast.ops` do, write into tensors that the caller allocates, and
check nothing, not even the device: under TRITON_INTERPRET=1 they run on CPU tensors.
"""
