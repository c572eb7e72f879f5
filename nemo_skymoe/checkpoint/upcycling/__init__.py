"""Upcycling makes a mixture of experts of dense models."""
