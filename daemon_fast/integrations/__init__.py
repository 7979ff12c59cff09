"""DAEMON inside other libraries: Transformers' `generate`, TRL's trainers, Ray Data."""
