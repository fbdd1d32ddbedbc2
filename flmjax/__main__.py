"""`python -m flmjax`, and the console script."""

from flmjax.interrupt import end_at_interrupts


def run() -> None:
    """Run the command line of this process; an interrupt of the imports ends it with one line too."""
    end_at_interrupts()
    from flmjax.cli import run as run_command_line

    run_command_line()


if __name__ == "__main__":
    run()
