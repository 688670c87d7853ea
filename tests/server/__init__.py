"""Tests of the front end: tokenizers, templates, text, requests and outputs."""
