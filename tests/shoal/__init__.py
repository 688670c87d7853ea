"""Tests of the public API and of the demo model."""
