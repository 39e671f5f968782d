"""The command line: one entry point, one thin file a command. Nothing here draws; it asks ``fluxloom.api``."""
