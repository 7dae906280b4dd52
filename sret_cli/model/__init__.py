"""The network: blocks, stages and the whole, and recursion on timm's models.

Its central idea is that a stage holds each block once and walks the schedule of its spec. It knows
neither data nor files. Importing it registers the presets with timm.
"""

from sret_cli.model.sret import build_model as build_model
