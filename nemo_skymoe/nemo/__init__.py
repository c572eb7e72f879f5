"""NeMo 2 model and configuration classes, callbacks and data. Importing a module here imports NeMo."""
