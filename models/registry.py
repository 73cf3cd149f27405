"""Models by the name a recipe gives them."""

from models.dit import DiT, DiTConfig

MODELS = {"dit": DiT}
CONFIGS = {"dit": DiTConfig}
