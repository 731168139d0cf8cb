"""The subcommands of ``python -m fastrnn``: each module has add_arguments() and run()."""
