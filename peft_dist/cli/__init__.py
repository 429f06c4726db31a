"""The `peft-dist` command: one file per family of subcommands."""
