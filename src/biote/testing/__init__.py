"""The contract that every port passes: plain assert functions (`contract`), and a pytest plugin (`plugin`)."""
