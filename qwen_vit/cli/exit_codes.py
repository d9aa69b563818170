"""How the command ends: also known before click can be imported."""

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "EXIT_SKIPPED"]

EXIT_SKIPPED = 1  # finished, with inputs skipped or a comparison that fails
EXIT_ERROR = 2  # usage, configuration or output error, or a question answered with no
EXIT_INTERRUPTED = 130
