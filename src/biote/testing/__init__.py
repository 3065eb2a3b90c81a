"""The contract that every port passes: plain assert functions, and a pytest plugin."""
