"""STATE: cells in sets and their embeddings (ST, SE)."""

from invirtuo.models.state.state_embedding import StateEmbedding
from invirtuo.models.state.state_transition import StateTransition

__all__ = ["StateEmbedding", "StateTransition"]
