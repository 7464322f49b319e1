"""Tests; one module per module of the library, and tests that cross them."""
