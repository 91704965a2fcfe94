"""The laboratory: suites and bars, runner, peers, ceilings; a module per verb; the pages; and the demo."""
