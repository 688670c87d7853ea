"""Ready-made layouts: YAML files that `--config NAME` finds, also from an installed wheel."""
