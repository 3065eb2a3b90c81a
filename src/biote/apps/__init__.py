"""The jobs people come with, for every port: they see a model through what its port declares."""
