"""Prometheus metrics under vLLM's names: instruments < catalog < recorder, exposition, http_metrics."""
