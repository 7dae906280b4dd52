"""The network: blocks, stages, the complete SReT, and recursion on timm models.

Its central idea is that a stage holds each block once and walks the schedule of its spec. It knows
neither data nor files. Importing it registers the presets with timm: `timm.create_model("sret_t")`.
"""

from sret_cli.model.sret import build_model as build_model
