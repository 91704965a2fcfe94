"""The demo: a real MLA model served through the paged latent cache, checked against transformers and the oracle, measured."""
