"""One run: steps, epochs, checkpoints, ranks, evaluation and distillation.

Its central idea is that every random number of a step follows from the seed and the step. So a run
can be stopped anywhere and still ends with the same bytes. This folder knows one run at a time.
"""
