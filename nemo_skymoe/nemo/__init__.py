"""NeMo 2 model and configuration classes, callbacks and data. Importing any module of this package imports NeMo."""
