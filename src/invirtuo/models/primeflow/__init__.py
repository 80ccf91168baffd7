"""PRiMeFlow: flow matching directly in gene-expression space."""

from invirtuo.models.primeflow.model import Config, PRiMeFlow

__all__ = ["Config", "PRiMeFlow"]
