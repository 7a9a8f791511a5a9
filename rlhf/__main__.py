"""`python -m rlhf <stage> CONFIG [a.b=c ...]`."""

from rlhf.cli import app

if __name__ == "__main__":
    app()
