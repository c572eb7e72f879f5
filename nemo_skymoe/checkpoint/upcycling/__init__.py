"""How a dense model becomes a mixture of experts."""
