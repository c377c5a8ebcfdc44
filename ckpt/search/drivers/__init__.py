"""The drivers that ckpt brings; importing this package registers them."""

from ckpt.search.drivers import cma_es, evolution, greedy, niches, surrogate

__all__ = ["cma_es", "evolution", "greedy", "niches", "surrogate"]
