"""What a noise law of one's own is written with: ``register_noise("mine", D**2 * (3 - 2 * D))``.

The definitions stand in `lotion_fx.numerics.noise`.
"""

from lotion_fx.numerics.noise import D, NoiseLaw, noises, register_noise

__all__ = ["D", "NoiseLaw", "noises", "register_noise"]
