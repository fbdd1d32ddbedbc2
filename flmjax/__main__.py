"""python -m flmjax"""

from flmjax.cli import run

run()
