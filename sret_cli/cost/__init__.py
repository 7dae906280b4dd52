"""What a model costs.

It has counted in closed form, traced by fvcore, predicted for memory, and timed.

Its central idea is that each distinct pass is looked at once and multiplied by its count. It knows
neither weights on disk nor training.
"""
