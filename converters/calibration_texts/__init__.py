"""Texts that this project wrote for calibration: data, read by `converters.calibration_builtin`.

One file per kind. In a .txt file a line "%%" stands between two texts; chat.jsonl has one conversation a row.
"""
