from context_pythia.cli.command_line import main

__all__ = ["main"]
