"""The one decoder, its families, weight loading and the paged KV cache."""
