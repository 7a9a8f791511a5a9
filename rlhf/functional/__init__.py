"""The mathematics of RLHF as pure functions: tensors in, tensors out, torch and the standard library only.

Nothing here whitens, reduces over ranks, or moves a tensor behind the caller's back. The letters in the names
(B, T, N, V, H, G, K) and the one aligned token axis are explained in `rlhf/types.py`.
"""
