"""Typed configuration: one declaration, its loader, ready-made layouts. Imports nothing above itself and no torch."""
