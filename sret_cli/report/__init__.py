"""Rows to tables, figures and model cards.

Its central idea is that rows hold raw numbers, and that only this folder rounds, names and draws
them. It runs no models.
"""
