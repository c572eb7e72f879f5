"""Turn text into Megatron's indexed datasets, and describe mixtures of them, without NeMo."""
