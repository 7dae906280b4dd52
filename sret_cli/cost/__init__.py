"""What a model costs: counted in closed form, traced by fvcore, predicted for memory, and timed.

Its central idea is that each distinct pass is measured once and multiplied by its count. It imports
nothing about weights on disk or training.
"""
