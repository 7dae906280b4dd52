"""Labelled images to batches.

Its central idea is that every sample is a function of (seed, epoch, index), on any
process and after any interruption. It knows no models, only the images that they take.
"""
