"""The subcommands, one file each: ``run(arguments)`` reads its own command line and returns the exit code."""

#: name, which is its file's → what it does, for --help; the first needs no name
COMMANDS = {
    "compress": "compress a checkpoint (what happens without a subcommand)",
    "eval": "measure a model on texts and lm-eval tasks, beside the one it was made from",
    "inspect": "show what a checkpoint holds; verify a compressed one",
    "bench": "measure speed and memory of a folder beside its dense model",
    "generate": "let a folder continue a prompt",
    "pack": "write a folder in another container: zeros left out, GPTQ's layout, or bitsandbytes",
    "unpack": "turn a packed folder back into the checkpoint, bit for bit",
    "report": "write report.html of a folder anew",
    "vision": "compress a convolutional network",
    "compare": "set several folders beside each other: quality, size, speed",
}
