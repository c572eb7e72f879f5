"""What travels with an exported checkpoint: files that need nothing but torch and transformers."""
