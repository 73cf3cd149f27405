"""Model families by the name a recipe gives them: what describes a model, and the module that it describes."""

from torch import nn

from models.dit import DiT, DiTConfig
from models.unified import Unified, UnifiedConfig
from models.vae import VAE, VAEConfig

ModelConfig = DiTConfig | UnifiedConfig | VAEConfig

CONFIGS: dict[str, type[ModelConfig]] = {"dit": DiTConfig, "unified": UnifiedConfig, "vae": VAEConfig}
MODELS: dict[str, type[nn.Module]] = {"dit": DiT, "unified": Unified, "vae": VAE}


def build_module(config: ModelConfig) -> nn.Module:
    """The module of a model's configuration, its weights not filled in."""
    return MODELS[config.name](config)
