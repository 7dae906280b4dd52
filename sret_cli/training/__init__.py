"""One run: steps, epochs, checkpoints, ranks, evaluation and distillation.

Its central idea is that all that is drawn in a step follows from the seed and the step, so that a
run can stop anywhere and end with the same bytes. It knows nothing of other runs.
"""
