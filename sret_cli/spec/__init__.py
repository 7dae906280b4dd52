"""What to build and how to train, as frozen values that check themselves.

Its central idea is that a stage is a schedule of passes over a bank of blocks; models, costs and
reports are views of that schedule. It does not import torch, and reads no files.
"""
