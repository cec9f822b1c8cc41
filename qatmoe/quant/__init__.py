"""Quantization: one grid definition shared by the forward pass, the packers and the plan.

`grid` defines the numbers, `fake` puts them into the forward pass, `pack` writes them as bytes and
`plan` says which tensor gets which grid.
"""
