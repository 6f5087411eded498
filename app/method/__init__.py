"""β-DPO (arXiv 2407.08639) as pure functions and small records; imports torch and the standard library only.

Shapes in the whole project: B pairs on this rank, G pairs in the global batch, T tokens in a packed row,
V entries in the vocabulary.
"""
