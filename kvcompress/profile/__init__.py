"""Measure a model on calibration prompts, and decide what each KV head keeps."""
