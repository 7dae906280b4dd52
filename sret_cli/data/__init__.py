"""Labelled images to batches.

Its central idea is that every sample is a function of (seed, epoch, index), whatever reads it and
whoever asks. It knows no models, only the images that they take.
"""
