"""Runnable examples; they ship with the package as `lotion_fx.examples`."""
