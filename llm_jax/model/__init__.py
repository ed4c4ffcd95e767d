"""The model: Linen modules that declare weights, the kernels they call, and the builders that turn them into pure
functions.
"""
