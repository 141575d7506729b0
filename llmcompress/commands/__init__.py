"""The subcommands, one file each: ``run(arguments)`` reads its own command line and returns the exit code."""

#: name, which is its file's → what it does, for --help; the first needs no name
COMMANDS = {
    "compress": "compress a checkpoint (what happens without a subcommand)",
}
