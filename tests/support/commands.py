"""Define the arguments of commands that many tests run."""

TO_FILE = ("--model", "tiny", "--device", "cpu", "--out", "f.safetensors")
