"""The laboratory: suites, runner, measured ceilings, reports, and the demo."""
