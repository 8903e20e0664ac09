from flacuna_jax.cli import script

script()
