"""Run the command line: python -m openmla."""

from openmla.cli import main

raise SystemExit(main())
