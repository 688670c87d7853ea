"""The demo model: a small Llama trained on the Python standard library. `shoal generate demo -p ...` uses it."""
