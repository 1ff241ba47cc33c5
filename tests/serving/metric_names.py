"""The list of metrics that test_metrics compares with, and the program that writes it anew.

python -m tests.serving.metric_names < page-of-metrics > tests/serving/metric_names.txt
"""

from __future__ import annotations

import sys

from prometheus_client.parser import text_string_to_metric_families


def described(page: str, prefix: str) -> set[tuple[str, str, str]]:
    """(name, type, labels) of every metric; PREFIX stands for the prefix. Buckets and values do not count."""
    rows = set()
    for family in text_string_to_metric_families(page):
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = family.name.replace(prefix, "PREFIX", 1) if family.name.startswith(prefix) else family.name
        rows.add((name, family.type, " ".join(labels)))
    return rows


def render(rows: set[tuple[str, str, str]]) -> str:
    return "".join(f"{name} {kind} {labels}".rstrip() + "\n" for name, kind, labels in sorted(rows))


if __name__ == "__main__":
    sys.stdout.write(render(described(sys.stdin.read(), "vllm:")))
