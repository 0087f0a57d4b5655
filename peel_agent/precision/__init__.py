"""precision: what a matrix becomes inside a weight set, by plain quantisation or by rounding in the Gram metric; and
products of float32 on hardware for fewer bits.
"""

from peel_agent.precision.products import coarse_products, float32_products
from peel_agent.precision.quantise import latents_of, quantise, straight_through
from peel_agent.precision.quantisers import Quantisers
from peel_agent.precision.recognise import recognise
from peel_agent.precision.rounding import round_in_gram

__all__ = [
    "Quantisers",
    "coarse_products",
    "float32_products",
    "latents_of",
    "quantise",
    "recognise",
    "round_in_gram",
    "straight_through",
]
