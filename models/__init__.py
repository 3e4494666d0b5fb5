"""Model packages: convert, inspect, open, run."""
