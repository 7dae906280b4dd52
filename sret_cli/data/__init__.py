"""Turns labelled images into batches.

Its central idea is that every sample is a function of (seed, epoch, index), whatever format the
images have and however many processes load them. It knows nothing of models but the images that
they take.
"""
