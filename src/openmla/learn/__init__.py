"""Exercises that a machine checks: what MLA costs, where a kernel loses, how to write one. `openmla learn`."""
