"""Benchmarks: ratios that are measured side by side in one run, and bounds against enumeration."""
