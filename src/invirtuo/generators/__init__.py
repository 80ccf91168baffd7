"""What models that draw whole populations of counts share: labels and depths, latent flows, correction, imputation."""

from invirtuo.generators.base import CountGenerator, Guidance, check_depths
from invirtuo.generators.hidden import mask_entries
from invirtuo.generators.latent import ConditionalFlow, LatentFlow

__all__ = ["ConditionalFlow", "CountGenerator", "Guidance", "LatentFlow", "check_depths", "mask_entries"]
