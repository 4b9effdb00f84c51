"""Measures the program from outside, through what everybody may use. Nothing imports it."""
