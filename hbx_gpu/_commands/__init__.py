"""The subcommands of `hbx-gpu`: each module adds its parser and runs one command."""
