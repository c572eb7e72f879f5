"""The modeling files that travel with an exported checkpoint. They need nothing but torch and transformers."""
