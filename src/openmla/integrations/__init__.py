"""OpenMLA inside other people's models and engines; each module imports its host on first use."""
