"""Turns labelled images into batches.

Every sample is a function of (seed, epoch, index), whatever format the images have and however many
processes load them. This folder knows nothing of models but the images that they take.
"""
