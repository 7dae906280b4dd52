"""sret: scaling studies of deep vision transformers with shared weights."""

__version__ = "0.1.0"
