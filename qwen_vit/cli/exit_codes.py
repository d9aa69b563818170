"""List the command's exit codes, without importing click."""

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "EXIT_SKIPPED"]

EXIT_SKIPPED = 1  # finished, but inputs were skipped, or a comparison or a check failed
EXIT_ERROR = 2  # usage, configuration or output error, no usable image, or an answer "no"
EXIT_INTERRUPTED = 130
