"""Models on disk: ours, checkpoints of the reference, and exports for other programs.

Its central idea is that nothing in a file is executed, and that every tensor is matched by name and
shape. It imports nothing about training or costs.
"""
