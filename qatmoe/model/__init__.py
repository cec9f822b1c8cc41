"""The model: plain functions over a nested dict of f32 parameters. Start in `transformer.py`.

Array names end in their axes, from one legend for the whole package:
B batch, L length, S keys to attend to, D model width, H heads, K kv heads, Dh head dim, F expert or FFN width,
E experts, T tokens (B*L), k experts per token, C capacity, R rows (tokens copied to their experts), G groups of tokens,
V vocab, N layers.

Every weight is stored (..., out, in): the contraction axis is the last one.
"""
