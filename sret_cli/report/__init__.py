"""Rows to tables, figures and model cards.

Its central idea is that rows hold raw numbers, and that only here they are rounded, named and
drawn. It runs no models.
"""
