"""The exception for wrong input of the user."""


class UserError(Exception):
    """A mistake in a config, a file or a command line.

    The message names the file, line or key and says what to do. Verbs print it without a traceback and exit
    with status 2 (`flacuna_jax.cli.run_verb`); all other errors exit with status 1.
    """
