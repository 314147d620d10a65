"""Formats, noise laws and rounding, each defined once: the lowest floor, on torch and sympy alone."""
