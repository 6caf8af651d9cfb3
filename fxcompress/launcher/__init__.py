"""What the shell command ``fxcompress`` runs, installed as ``fxcompress_launcher``.

Importing anything of ``fxcompress`` imports torch, which takes seconds; this package lies beside it, so that Ctrl-C in
those seconds ends the command as it ends any other, without a traceback.
"""

import signal


def main() -> int:
    """Runs the command line; gives the exit code."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fxcompress.cli import main as run

    signal.signal(signal.SIGINT, handler)
    return run()
